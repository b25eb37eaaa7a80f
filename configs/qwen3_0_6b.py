"""Qwen3-0.6B-Base taught by Qwen3-4B to solve the school problems of GSM8K.

Not yet run on accelerators by us.

Command, on one chip or card of 16 GB (a TPU v5e chip)::

    python -m lopd.main --config=configs/qwen3_0_6b.py

Teacher Qwen/Qwen3-4B, student Qwen/Qwen3-0.6B-Base. Compiled for one v5e chip, no program takes
more than 12.0 GiB of its 15.75 (with `runtime.slots=16`). The stages before `eval` take 8 hours
there at half of the binding floor, if every response is as long as it may be; answers to GSM8K are
shorter. On one H100 they take 0.8 hours, by formula.
A trial of minutes, with everything else as it is: `--config=configs/qwen3_0_6b.py:small`.
"""

from lopd import config as lopd_config


def get_config(overlay=""):
    """The recipe of `lopd.config.one_chip_config` with this pair of models."""
    config = lopd_config.one_chip_config()
    config.teacher.checkpoint = "Qwen/Qwen3-4B"
    config.student.checkpoint = "Qwen/Qwen3-0.6B-Base"
    return lopd_config.overlaid(config, overlay)
