"""Weights on disks and in buckets: Hugging Face's format and Orbax's."""
