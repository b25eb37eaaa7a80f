"""A Qwen3 model's shape as Hugging Face's `config.json` states it, in and out."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from lopd.errors import UserError
from lopd.models.decoder import DecoderConfig

CONFIG = "config.json"
"""The file in which a checkpoint states its shape."""

_ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


def read_json(path: epath.Path) -> dict:
    """A JSON file of a checkpoint.

    Raises:
      UserError: if it is missing or is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: not a Hugging Face checkpoint") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def _unsupported(values: Mapping[str, Any]) -> Iterator[str]:
    """The settings of a `config.json` that this model does not have, as `name=value`."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    layer_types = set(values.get("layer_types") or ()) - {"full_attention"}
    refused = {
        "attention_bias": values.get("attention_bias"),
        "use_sliding_window": values.get("use_sliding_window"),
        "layer_types": sorted(layer_types),
        "mlp_only_layers": values.get("mlp_only_layers"),
        "quantization_config": values.get("quantization_config"),
    }
    yield from (f"{name}={value!r}" for name, value in refused.items() if value)
    expected = {
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "hidden_act": (values.get("hidden_act", "silu"), "silu"),
        "decoder_sparse_step": (values.get("decoder_sparse_step", 1), 1),
    }
    yield from (f"{k}={found!r}" for k, (found, wanted) in expected.items() if found != wanted)


def config_from_hf(values: Mapping[str, Any]) -> DecoderConfig:
    """The shape that a checkpoint's `config.json` describes.

    Reads what Transformers 4 wrote (`rope_theta`, `torch_dtype`, `num_experts`) and what 5 writes
    (`rope_parameters`, `dtype`, `num_local_experts`). A bfloat16 checkpoint computes in bfloat16;
    any other, float16 included, in float32.

    Raises:
      UserError: if it is not a Qwen3 language model, lacks a field, or uses what is not
        implemented (attention bias, sliding window, scaled RoPE, dense layers between experts,
        quantised weights).
    """
    kind, architectures = values.get("model_type"), values.get("architectures")
    known = kind in _ARCHITECTURES
    if not known or architectures not in (None, [_ARCHITECTURES[kind]]):
        raise UserError(
            f"config.json describes model_type={kind!r}, architectures={architectures}; only "
            f"{' and '.join(_ARCHITECTURES.values())} are implemented"
        )
    unsupported = list(_unsupported(values))
    if unsupported:
        raise UserError(f"config.json asks for {', '.join(unsupported)}, which is not implemented")
    rope = values.get("rope_parameters") or {}
    stored = values.get("dtype", values.get("torch_dtype"))
    try:
        experts = {}
        if kind == "qwen3_moe":
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
            rope_theta=float(rope["rope_theta"] if rope else values["rope_theta"]),
            rms_norm_eps=values["rms_norm_eps"],
            tie_word_embeddings=values.get("tie_word_embeddings", False),
            max_position_embeddings=values["max_position_embeddings"],
            initializer_range=values.get("initializer_range", 0.02),
            dtype="bfloat16" if stored == "bfloat16" else "float32",
            **experts,
        )
    except KeyError as error:
        raise UserError(f"config.json lacks {error.args[0]}") from error


def config_to_hf(config: DecoderConfig, end_id: int, dtype: str) -> dict:
    """The `config.json` of a checkpoint whose weights are stored as `dtype`."""
    kind = "qwen3_moe" if config.num_experts else "qwen3"
    values = {
        "architectures": [_ARCHITECTURES[kind]],
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
        "attention_bias": False,
        "use_sliding_window": False,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": end_id,
    }
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
