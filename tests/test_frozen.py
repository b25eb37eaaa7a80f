"""Trainable and frozen parameters, handed in as two trees."""

FROZEN = ("embed",)
