"""Qwen3 as pure functions over a parameter tree."""
