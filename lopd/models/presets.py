"""Published shapes, from the `config.json` files on the hub.

Keys are hub names without the organisation. Of Qwen3, a post-trained model and its `-Base` differ
in the longest position; the 2507 releases also in the rotary base.
"""

import dataclasses

from lopd.models.decoder_config import DecoderConfig, RopeScaling


def _dense(hidden, intermediate, layers, heads, tied) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=1e6,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
        dtype="bfloat16",
    )


_POST_TRAINED = {
    "Qwen3-0.6B": _dense(1024, 3072, 28, 16, tied=True),
    "Qwen3-1.7B": _dense(2048, 6144, 28, 16, tied=True),
    "Qwen3-4B": _dense(2560, 9728, 36, 32, tied=True),
    "Qwen3-8B": _dense(4096, 12288, 36, 32, tied=False),
    "Qwen3-14B": _dense(5120, 17408, 40, 40, tied=False),
    "Qwen3-32B": _dense(5120, 25600, 64, 64, tied=False),
    "Qwen3-30B-A3B": dataclasses.replace(
        _dense(2048, 6144, 48, 32, tied=False),
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
}

_BASE = {
    f"{name}-Base": dataclasses.replace(config, max_position_embeddings=32768)
    for name, config in _POST_TRAINED.items()
    if name != "Qwen3-32B"  # never published
}

_2507 = {
    f"{name}-{kind}-2507": dataclasses.replace(
        _POST_TRAINED[name], max_position_embeddings=262144, rope_theta=theta
    )
    for name, theta in (("Qwen3-4B", 5e6), ("Qwen3-30B-A3B", 1e7))
    for kind in ("Instruct", "Thinking")
}

_QWEN2 = DecoderConfig(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=32768,
    dtype="bfloat16",
    qk_norm=False,
    attention_bias=True,
)

_QWEN25 = {
    "Qwen2.5-0.5B": _QWEN2,
    "Qwen2.5-1.5B": dataclasses.replace(
        _QWEN2,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        head_dim=128,
        max_position_embeddings=131072,
    ),
    "Qwen2.5-7B": dataclasses.replace(
        _QWEN2,
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    ),
}

_QWEN25_INSTRUCT = {
    f"{name}-Instruct": dataclasses.replace(config, max_position_embeddings=32768)
    for name, config in _QWEN25.items()
}

_LLAMA2 = DecoderConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    max_position_embeddings=4096,
    dtype="float32",
    qk_norm=False,
)

_LLAMA31 = dataclasses.replace(
    _LLAMA2,
    vocab_size=128256,
    intermediate_size=14336,
    num_key_value_heads=8,
    rope_theta=5e5,
    max_position_embeddings=131072,
    dtype="bfloat16",
    rope_scaling=RopeScaling(
        "llama3",
        factor=8.0,
        original_max_position_embeddings=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    ),
)

_LLAMA = {
    "Llama-2-7b-hf": _LLAMA2,
    "Llama-3.1-8B": _LLAMA31,
    "Llama-3.2-1B": dataclasses.replace(
        _LLAMA31,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        head_dim=64,
        tie_word_embeddings=True,
        rope_scaling=dataclasses.replace(_LLAMA31.rope_scaling, factor=32.0),
    ),
}

_SMOL = DecoderConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    rope_theta=1e5,
    rms_norm_eps=1e-5,
    max_position_embeddings=8192,
    initializer_range=0.041666666666666664,
    dtype="bfloat16",
    qk_norm=False,
)

_SMOLLM2 = {
    "SmolLM2-135M": _SMOL,
    "SmolLM2-360M": dataclasses.replace(
        _SMOL,
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        initializer_range=0.02,
    ),
}

_INSTRUCT = {
    f"{name}-Instruct": config
    for name, config in (_SMOLLM2 | _LLAMA).items()
    if name != "Llama-2-7b-hf"
}

PRESETS = _POST_TRAINED | _BASE | _2507 | _QWEN25 | _QWEN25_INSTRUCT | _LLAMA | _SMOLLM2 | _INSTRUCT
"""Hub name → shape, computing in the type that its weights are published in."""
