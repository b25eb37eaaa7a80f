"""Qwen3 weights in Hugging Face's layout: one table says where every tensor goes."""

import json

import jax
import numpy as np
import safetensors.numpy
from etils import epath

from lopd.artefact import write_atomically
from lopd.models.qwen3 import Params, Qwen3Config

_TOP = {
    "model.embed_tokens.weight": "embed",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "lm_head",
}
_LAYER = {
    "input_layernorm.weight": ("input_norm",),
    "post_attention_layernorm.weight": ("post_attention_norm",),
    "self_attn.q_proj.weight": ("attention", "q"),
    "self_attn.k_proj.weight": ("attention", "k"),
    "self_attn.v_proj.weight": ("attention", "v"),
    "self_attn.o_proj.weight": ("attention", "o"),
    "self_attn.q_norm.weight": ("attention", "q_norm"),
    "self_attn.k_norm.weight": ("attention", "k_norm"),
    "mlp.gate_proj.weight": ("mlp", "gate"),
    "mlp.up_proj.weight": ("mlp", "up"),
    "mlp.down_proj.weight": ("mlp", "down"),
}


def _to_hf(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """Our layout to PyTorch's [out, in]: q, k, v are [D, H, N] here, o is [H, N, D]."""
    name = path[-1]
    if name in ("q", "k", "v"):
        array = array.reshape(array.shape[0], -1)
    elif name == "o":
        array = array.reshape(-1, array.shape[-1])
    return np.ascontiguousarray(array.T) if array.ndim == 2 else array


def to_hf_tensors(config: Qwen3Config, params: Params) -> dict[str, np.ndarray]:
    """All weights under their Hugging Face names, on the host."""
    params = jax.device_get(params)
    tensors = {name: params[key] for name, key in _TOP.items() if key in params}
    for suffix, path in _LAYER.items():
        stacked = params["layers"]
        for key in path:
            stacked = stacked[key]
        for i in range(config.num_hidden_layers):
            tensors[f"model.layers.{i}.{suffix}"] = _to_hf(path, stacked[i])
    return tensors


def hf_config(config: Qwen3Config, end_id: int) -> dict:
    """The `config.json` of a checkpoint."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
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
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": end_id,
    }


def save_checkpoint(path: epath.Path, config: Qwen3Config, params: Params, *, end_id: int) -> None:
    """Writes a directory that Transformers' `from_pretrained` loads."""
    data = safetensors.numpy.save(to_hf_tensors(config, params), metadata={"format": "pt"})
    (path / "model.safetensors").write_bytes(data)
    write_atomically(path / "config.json", json.dumps(hf_config(config, end_id), indent=2) + "\n")
    generation = {"eos_token_id": end_id, "do_sample": False}
    write_atomically(path / "generation_config.json", json.dumps(generation, indent=2) + "\n")
