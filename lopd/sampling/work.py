"""The cost of one call of prefill or decode by formula, on the chips of a training mesh."""

from lopd.models.decoder_config import DecoderConfig
from lopd.models.flops import forward_flops
from lopd.models.memory import LOGIT_ARRAYS, cache_bytes, model_size, working_set
from lopd.models.work import Work
from lopd.sampling.placement import sampling_sizes
from lopd.sampling.shapes import PROMPTS_PER_CALL, prompts_at_once


def prefill_work(
    model: DecoderConfig, mesh: dict[str, int], *, slots: int, capacity: int, length: int
) -> Work:
    """Reading `PROMPTS_PER_CALL` prompts of `length` tokens."""
    mesh = sampling_sizes(model, mesh)
    weights = model_size(model).total * model.compute_dtype.itemsize / mesh["tensor"]
    at_once = prompts_at_once(length, mesh["data"], "tpu")
    tokens = at_once * length / mesh["data"]
    chips = mesh["data"] * mesh["tensor"]
    held = cache_bytes(model, slots * capacity) / chips
    held += cache_bytes(model, tokens) / mesh["tensor"]
    return Work(
        flops=forward_flops(model, PROMPTS_PER_CALL * length, length / 2),
        bytes_per_chip=weights * -(-PROMPTS_PER_CALL // at_once),
        peak_bytes=weights + held + working_set(model, tokens, mesh["tensor"]),
    )


def decoding_work(
    model: DecoderConfig, mesh: dict[str, int], *, slots: int, capacity: int, steps: int
) -> Work:
    """`steps` tokens in each slot, its cache half full on average."""
    mesh = sampling_sizes(model, mesh)
    weights = model_size(model).total * model.compute_dtype.itemsize / mesh["tensor"]
    cache = cache_bytes(model, slots * capacity) / (mesh["data"] * mesh["tensor"])
    logits = LOGIT_ARRAYS * 4 * slots / mesh["data"] * model.vocab_size / mesh["tensor"]
    return Work(
        flops=forward_flops(model, slots * steps, capacity / 2),
        bytes_per_chip=steps * (weights + cache / 2),
        peak_bytes=weights + cache + logits,
    )
