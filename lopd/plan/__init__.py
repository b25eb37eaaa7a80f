"""Planning a run without its hardware: what it needs, how long it takes, whether it fits."""
