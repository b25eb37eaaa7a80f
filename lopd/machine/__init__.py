"""Devices, processes, files and signals: what knows nothing of models."""
