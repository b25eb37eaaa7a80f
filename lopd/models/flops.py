"""Model FLOPs by formula. Units: FLOPs, of all devices together."""

from lopd.models.decoder_config import DecoderConfig


def training_flops(
    config: DecoderConfig,
    positions: float,
    positions_squared: float,
    adapter_weights: int | None = None,
) -> float:
    """Model FLOPs of a forward and a backward pass; recomputation does not count.

    Six per matmul weight and position (of a mixture of experts, the chosen ones), and for causal
    attention six per layer, head dimension and pair of positions. A weight that is frozen under
    adapters has no gradient of its own: four, and six for each of the adapters'.

    Args:
      config: the model's shape.
      positions: of all sequences together.
      positions_squared: Σ of each sequence's length squared.
      adapter_weights: of all layers together, where they alone are trained.
    """
    D, N = config.hidden_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    mlp = 3 * D * config.intermediate_size
    if config.num_experts:
        chosen = config.num_experts_per_tok * config.moe_intermediate_size
        mlp = 3 * D * chosen + D * config.num_experts
    layer = 2 * D * H * N + 2 * D * K * N + mlp
    weights = config.num_hidden_layers * layer + config.vocab_size * D
    by_weights = 6 * weights if adapter_weights is None else 4 * weights + 6 * adapter_weights
    return by_weights * positions + 6 * config.num_hidden_layers * H * N * positions_squared


def forward_flops(config: DecoderConfig, tokens: float, context: float) -> float:
    """Model FLOPs of a forward pass over tokens that attend to `context` others on average."""
    return training_flops(config, tokens, 2 * tokens * context) / 3
