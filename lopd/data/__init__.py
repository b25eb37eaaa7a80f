"""Tokenizers, packing and step-indexed batches."""
