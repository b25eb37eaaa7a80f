"""Qwen3-1.7B-Base taught by Qwen3-8B on DAPO-Math-17k.

Not yet run on accelerators by us. What differs from `qwen3_0_6b.py`: the models, competition
problems instead of school problems, and twice as long responses.

Command, on one device of 40 to 80 GB or eight TPU v5e chips::

    python -m lopd.main --config=configs/qwen3_1_7b.py

Teacher Qwen/Qwen3-8B, student Qwen/Qwen3-1.7B-Base. Compiled for v5e:2x4, no program takes more
than 8.9 GiB of a chip's 15.75, and the stages before `eval` take 2.1 hours (17 chip-hours) at half
of the binding floor, if every response is as long as it may be. On one H100 by formula: 3.9 hours,
a training step 33 GiB, scoring by the teacher 19; sampling fills what is left.
A trial of minutes: `--config=configs/qwen3_1_7b.py:small`.
"""

from lopd import config as lopd_config


def get_config(overlay=""):
    """The recipe of `lopd.config.one_chip_config` with this pair of models and harder problems."""
    config = lopd_config.one_chip_config()
    config.teacher.checkpoint = "Qwen/Qwen3-8B"
    config.student.checkpoint = "Qwen/Qwen3-1.7B-Base"
    config.prompt_length = 1024
    config.task.update(
        sft_prompts="hf:BytedTsinghua-SIA/DAPO-Math-17k",
        opd_prompts="hf:BytedTsinghua-SIA/DAPO-Math-17k",
        problems="hf:HuggingFaceH4/MATH-500,hf:HuggingFaceH4/aime_2024",
    )
    config.sft_data.update(prompts=14_000, samples=1)
    config.precompute.prompts = 14_000
    for section in (config.sft_data, config.precompute, config.heldout, config.eval):
        section.response_length = 2048
    for section in (config.sft, config.precompute, config.heldout, config.opd):
        section.row_length = 3072
    config.runtime.rows_per_micro = 8
    return lopd_config.overlaid(config, overlay)
