"""The published Qwen3 shapes, from the `config.json` files of the Qwen organisation on the hub.

Keys are hub names without the organisation. A post-trained model and its `-Base` differ in the
longest position; the 2507 releases also in the rotary base.
"""

import dataclasses

from lopd.models.decoder import DecoderConfig


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

PRESETS = _POST_TRAINED | _BASE | _2507
"""Hub name → shape, computing in bfloat16."""
