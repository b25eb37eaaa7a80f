"""Verifiable tasks: problems made from a seed, worked-out answers and exact graders."""
