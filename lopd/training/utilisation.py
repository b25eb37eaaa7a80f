"""How much of the hardware training uses: model FLOPs by formula over the devices' peak."""

import jax

from lopd.models.qwen3 import Qwen3Config
from lopd.planner.chips import CHIPS

_PEAK_BF16 = {
    # Dense bfloat16 FLOP/s of one device, by a part of the name that jax gives the device; the
    # first that fits counts. What nobody plans for is from the vendors' data sheets.
    "B200": 2250e12,
    "H200": CHIPS["h200"].flops,
    "H100 PCIe": 756e12,
    "H100": CHIPS["h100"].flops,
    "A100": CHIPS["a100"].flops,
    "TPU v6": CHIPS["v6e"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v4": CHIPS["v4"].flops,
}


def training_flops(config: Qwen3Config, positions: float, positions_squared: float) -> float:
    """Model FLOPs of a forward and a backward pass; recomputation does not count.

    Six per matmul weight and position (of a mixture of experts, the chosen ones), and for causal
    attention six per layer, head dimension and pair of positions.

    Args:
      config: the model's shape.
      positions: of all sequences together.
      positions_squared: Σ of each sequence's length squared.
    """
    D, N = config.hidden_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    mlp = 3 * D * config.intermediate_size
    if config.num_experts:
        chosen = config.num_experts_per_tok * config.moe_intermediate_size
        mlp = 3 * D * chosen + D * config.num_experts
    layer = 2 * D * H * N + 2 * D * K * N + mlp
    weights = config.num_hidden_layers * layer + config.vocab_size * D
    return 6 * weights * positions + 6 * config.num_hidden_layers * H * N * positions_squared


def peak_flops(devices: list[jax.Device]) -> float | None:
    """Their bfloat16 peak together, in FLOP/s; None where it is not known, as of a CPU."""
    for name, peak in _PEAK_BF16.items():
        if name.lower() in devices[0].device_kind.lower():
            return peak * len(devices)
    return None
