"""Sampling responses: jitted prefill and decode, and the slot engine that drives them."""
