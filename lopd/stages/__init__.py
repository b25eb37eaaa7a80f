"""The stages of a run. The module of a stage has its name, and no stage imports another."""
