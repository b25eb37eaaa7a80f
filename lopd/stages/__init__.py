"""The stages of a run. Each module says which settings it depends on, what it reads, and runs."""
