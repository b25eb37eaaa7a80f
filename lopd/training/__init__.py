"""The jitted training step, its state, checkpoints and loop."""
