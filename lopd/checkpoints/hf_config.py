"""A model's shape as Hugging Face's `config.json` states it, in and out, and the families."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from lopd.errors import UserError
from lopd.machine.reading import json_kind, read_json_object
from lopd.models.decoder_config import ROPE_FIELDS, DecoderConfig, RopeScaling

CONFIG = "config.json"
"""The file in which a checkpoint states its shape."""


@dataclasses.dataclass(frozen=True)
class Family:
    """The flags of `DecoderConfig` that all models of one `model_type` share."""

    architecture: str
    """In `architectures` of `config.json`."""
    states: Mapping[str, bool]
    """Settings that our export writes so for readers that ask; import refuses them when true."""
    qk_norm: bool = False
    """As `DecoderConfig` has it."""
    attention_bias: bool = False
    """As `DecoderConfig` has it."""
    experts: bool = False
    """Whether its models are mixtures of experts."""
    may_omit: tuple[str, ...] = ()
    """Fields that `config.json` files leave out, and for which Transformers has a rule."""
    head_dim: int | None = None
    """Of a file that leaves it out; None: hidden_size / heads."""


FAMILIES = {
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"attention_bias": False, "use_sliding_window": False},
        qk_norm=True,
        may_omit=("head_dim",),
        head_dim=128,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {"attention_bias": False, "use_sliding_window": False},
        qk_norm=True,
        experts=True,
        may_omit=("head_dim",),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"use_sliding_window": False},
        attention_bias=True,
        may_omit=("head_dim",),
    ),
    "llama": Family(
        "LlamaForCausalLM",
        {"attention_bias": False, "mlp_bias": False},
        may_omit=("head_dim", "num_key_value_heads", "rope_theta"),
    ),
}
"""`model_type` → family. Qwen2.5 and DeepSeek-R1-Distill-Qwen are qwen2; llama is Llama 2 to 3.3,
SmolLM2 and DeepSeek-R1-Distill-Llama."""

_REFUSED = (
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "mlp_only_layers",
    "rope_interleaved",
    "quantization_config",
)
"""Settings that are refused in every family when true."""


def read_json(path: epath.Path) -> dict:
    """A JSON file of a checkpoint.

    Raises:
      UserError: if it is missing or holds no JSON object.
    """
    try:
        return read_json_object(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: not a Hugging Face checkpoint") from error


def _unsupported(values: Mapping[str, Any], family: Family) -> Iterator[str]:
    """The settings of a `config.json` that this model does not have, as `name=value`."""
    refused = {name: values.get(name) for name in _REFUSED}
    if family.attention_bias:  # Transformers has them whatever the file says
        del refused["attention_bias"]
    kinds = values.get("layer_types") or []
    refused["layer_types"] = [kind for kind in kinds if kind != "full_attention"][:1]
    yield from (f"{name}={value!r}" for name, value in refused.items() if value)
    expected = {  # swish is Transformers' other name of silu
        "hidden_act": ("silu", "swish"),
        "decoder_sparse_step": (1,),
        "partial_rotary_factor": (1,),
    }
    for name, wanted in expected.items():
        if (found := values.get(name)) not in (None, *wanted):
            yield f"{name}={found!r}"


_TYPES = {
    "model_type": str,
    "architectures": list,
    "hidden_size": int,
    "num_attention_heads": int,
    "head_dim": int,
    "num_experts": int,
    "num_local_experts": int,
    "layer_types": list,
    "rope_theta": float,
    "rope_scaling": dict,
    "rope_parameters": dict,
    "dtype": str,
    "torch_dtype": str,
}
"""Types of the fields that are computed with here; the model's shape checks the rest."""


def _check_types(values: Mapping[str, Any]) -> None:
    """Refuses values of another type than a `config.json` has, and heads that do not divide."""
    for name, kind in _TYPES.items():
        value = values.get(name)
        allowed = (int, float) if kind is float else (kind,)
        if value is None or (isinstance(value, allowed) and not isinstance(value, bool)):
            continue
        raise UserError(f"config.json: {name} is {json_kind(value)}, {value!r:.80}")
    heads = values.get("num_attention_heads")
    if heads is not None and heads <= 0:
        raise UserError(f"config.json: num_attention_heads={heads} must be positive")


def _check_token_ids(values: Mapping[str, Any], vocab_size: int) -> None:
    """Refuses end tokens that the embedding has not."""
    stated = values.get("eos_token_id")
    for token in stated if isinstance(stated, list) else [stated]:
        whole = isinstance(token, int) and not isinstance(token, bool)
        if token is not None and not (whole and 0 <= token < vocab_size):
            raise UserError(
                f"config.json: eos_token_id={stated!r} is no token of a vocabulary of {vocab_size}"
            )


def _spelled(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`rope_scaling` or `rope_parameters`, with the old `type` as `rope_type`, without nulls."""
    rope = {key: value for key, value in (values.get(name) or {}).items() if value is not None}
    theta = rope.get("rope_theta", 0)
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise UserError(f"config.json: {name}.rope_theta is {json_kind(theta)}, {theta!r:.80}")
    kind = rope.pop("type", None)
    if rope and kind not in (None, rope.get("rope_type", kind)):
        raise UserError(
            f"config.json: {name} states type={kind!r} and rope_type={rope['rope_type']!r}"
        )
    return {"rope_type": kind, **rope} if kind else rope


def _stated_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """All that a `config.json` says of rotary embedding, in one dictionary.

    Transformers 4 reads `rope_theta` and `rope_scaling`. Transformers 5 writes `rope_parameters`,
    but where `rope_scaling` is there (added by hand for YaRN, as Qwen3's model cards advise) reads
    that alone, with `rope_theta` from beside it or else 10,000. So places may not disagree.
    """
    scaling, parameters = _spelled(values, "rope_scaling"), _spelled(values, "rope_parameters")
    rope, theta = dict(scaling or parameters), values.get("rope_theta")
    if theta is not None and rope.setdefault("rope_theta", theta) != theta:
        raise UserError(
            f"config.json states rope_theta={theta} and, among the rotary settings, "
            f"{rope['rope_theta']}; one of them is wrong"
        )
    beside = {k: v for k, v in parameters.items() if (k, v) != ("rope_type", "default")}
    for name, value in beside.items():
        if rope.get(name) != value:
            raise UserError(
                f"config.json states {name}={value!r} in rope_parameters and "
                f"{rope.get(name, 'nothing')!r} with rope_scaling, of which Transformers reads "
                "rope_scaling only: put all of them into one of the two"
            )
    return rope


def _rope(values: Mapping[str, Any]) -> tuple[float | None, RopeScaling | None]:
    """rope_theta, None if it is not stated, and the scaling."""
    rope = _stated_rope(values)
    kind, theta = rope.pop("rope_type", "default"), rope.pop("rope_theta", None)
    if (part := rope.pop("partial_rotary_factor", 1)) != 1:
        raise UserError(
            f"config.json asks for partial_rotary_factor={part!r}, which is not implemented"
        )
    if kind == "default":
        if rope:
            raise UserError(f"config.json states {rope} for RoPE, but no rope_type that uses it")
        return theta, None
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise UserError(f"config.json asks for rope_type={kind!r}, which is not implemented")
    length = "original_max_position_embeddings"
    if length in ROPE_FIELDS[kind][0]:
        outside = values.get(length)
        if outside is not None and rope.setdefault(length, outside) != outside:
            raise UserError(f"config.json states {length}={outside} and, for RoPE, {rope[length]}")
        rope.setdefault(length, values["max_position_embeddings"])
    if kind == "yarn":
        scales = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
        _check_numbers({"mscale": scales[0], "mscale_all_dim": scales[1], **rope})
        if all(scales) and "factor" in rope:
            above, below = (0.1 * scale * math.log(rope["factor"]) + 1 for scale in scales)
            rope.setdefault("attention_factor", above / below)
    try:
        return theta, RopeScaling(kind, rope.pop("factor", None), **rope)
    except TypeError as error:
        raise UserError(f"config.json: rope_type={kind!r}: {error}") from error


def _check_numbers(rope: Mapping[str, Any]) -> None:
    """Refuses what YaRN computes with if it is no positive number."""
    for name in ("mscale", "mscale_all_dim", "factor"):
        value = rope.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < math.inf):
            raise UserError(f"config.json: {name}={value!r:.80} must be a positive number")


def _derived(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields that the file leaves out and Transformers derives."""
    for name in ("num_attention_heads", "hidden_size"):
        if values.get(name) is None:
            raise KeyError(name)
    heads = values["num_attention_heads"]
    rules = {
        "head_dim": family.head_dim or values["hidden_size"] // heads,
        "num_key_value_heads": heads,
        "rope_theta": 10_000.0,
    }
    return {name: rules[name] for name in family.may_omit if values.get(name) is None}


def config_from_hf(values: Mapping[str, Any]) -> DecoderConfig:
    """The shape that a checkpoint's `config.json` describes.

    Reads what Transformers 4 wrote (`rope_theta`, `torch_dtype`, `num_experts`) and what 5 writes
    (`rope_parameters`, `dtype`, `num_local_experts`). A bfloat16 checkpoint computes in bfloat16;
    any other, float16 included, in float32.

    Raises:
      UserError: if it is of none of `FAMILIES`, lacks a field, contradicts itself, or uses what is
        not implemented (biases of the attention's output or the MLP, sliding window, other RoPE
        scalings, dense layers between experts, quantised weights).
    """
    _check_types(values)
    kind, architectures = values.get("model_type"), values.get("architectures")
    family = FAMILIES.get(kind)
    if family is None or architectures not in (None, [family.architecture]):
        raise UserError(
            f"config.json describes model_type={kind!r}, architectures={architectures}; only "
            f"{', '.join(f.architecture for f in FAMILIES.values())} are implemented"
        )
    unsupported = list(_unsupported(values, family))
    if unsupported:
        raise UserError(f"config.json asks for {', '.join(unsupported)}, which is not implemented")
    try:
        theta, scaling = _rope(values)
        values = {**values, "rope_theta": theta}
        config = _decoder_config(values | _derived(values, family), family, scaling)
    except KeyError as error:
        raise UserError(f"config.json lacks {error.args[0]}") from error
    _check_token_ids(values, config.vocab_size)
    return config


def _decoder_config(
    values: Mapping[str, Any], family: Family, scaling: RopeScaling | None
) -> DecoderConfig:
    """From the settings of a file that is known to be supported; KeyError for what it lacks."""
    stored = values.get("dtype", values.get("torch_dtype"))
    if values["rope_theta"] is None:
        raise KeyError("rope_theta")
    experts = {}
    if family.experts:
        if not (values.get("num_local_experts") or values["num_experts"]):
            raise KeyError("num_experts")
        experts = dict(
            num_experts=values.get("num_local_experts") or values["num_experts"],
            num_experts_per_tok=values["num_experts_per_tok"],
            moe_intermediate_size=values["moe_intermediate_size"],
            norm_topk_prob=values.get("norm_topk_prob", False),
            router_aux_loss_coef=values.get("router_aux_loss_coef", 0.001),
        )
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=values["num_attention_heads"],
        num_key_value_heads=values["num_key_value_heads"],
        head_dim=values["head_dim"],
        rope_theta=float(values["rope_theta"]),
        rms_norm_eps=values["rms_norm_eps"],
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        max_position_embeddings=values["max_position_embeddings"],
        initializer_range=values.get("initializer_range", 0.02),
        dtype="bfloat16" if stored == "bfloat16" else "float32",
        qk_norm=family.qk_norm,
        attention_bias=family.attention_bias,
        rope_scaling=scaling,
        **experts,
    )


def model_type(config: DecoderConfig) -> str:
    """The `model_type`, a key of `FAMILIES`, whose flags a model has.

    Raises:
      UserError: if there is none, so that it cannot be exported.
    """
    flags = bool(config.num_experts), config.qk_norm, config.attention_bias
    for name, family in FAMILIES.items():
        if flags == (family.experts, family.qk_norm, family.attention_bias):
            return name
    raise UserError(
        f"model: no family of Hugging Face's has num_experts={config.num_experts}, "
        f"qk_norm={config.qk_norm} and attention_bias={config.attention_bias} together"
    )


def config_to_hf(config: DecoderConfig, end_id: int, dtype: str) -> dict:
    """The `config.json` of a checkpoint whose weights are stored as `dtype`.

    Raises:
      UserError: if no family has the flags of the model.
    """
    kind = model_type(config)
    values = {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        **FAMILIES[kind].states,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": end_id,
    }
    if config.rope_scaling:
        scaling = dataclasses.asdict(config.rope_scaling)
        values["rope_scaling"] = {k: v for k, v in scaling.items() if v is not None}
    if config.num_experts:
        values |= {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": config.norm_topk_prob,
            "router_aux_loss_coef": config.router_aux_loss_coef,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return values


def checkpoint_config(path: epath.Path) -> DecoderConfig:
    """The shape that a checkpoint's `config.json` states.

    Raises:
      UserError: if it is missing, or is refused by `config_from_hf`.
    """
    try:
        return config_from_hf(read_json(path / CONFIG))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
