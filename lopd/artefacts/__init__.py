"""Artefacts: directories with a manifest, the identity of weights, and what work has cost."""
