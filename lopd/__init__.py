"""Lightning OPD in JAX: offline on-policy distillation for Qwen3 (arXiv 2604.13010)."""

__version__ = "0.1.0"
