"""Qwen3-8B-Base taught by Qwen3-32B, by low-rank adapters on one GPU of 80 GB.

Not yet run on accelerators by us. What differs from `qwen3_8b.py`: adapters of rank 32 at ten times
the learning rate; and, because one GPU cannot write 300,000 long answers, 5,000 SFT answers of at
most 4,096 tokens, 100 steps on them, and 4 samples of each test problem, of at most 8,192 tokens.
So the paper's figures are not to be expected.

Command, on one GPU of 80 GB::

    python -m lopd.main --config=configs/qwen3_8b_lora.py

By formula, on one H100: scoring by the teacher takes 64.4 of its 79.6 GiB, a training step 19.8.
The stages before `eval` take 62 hours at half of the binding floor, if every response is as long as
it may be; half of that is the teacher writing SFT answers, which an SFT model from elsewhere saves
(see `qwen3_8b.py`).
A trial with short responses: `--config=configs/qwen3_8b_lora.py:small`.
"""

from lopd import config as lopd_config


def get_config(overlay=""):
    """The recipe of `lopd.config.paper_config` with this pair, adapters, and fewer answers."""
    config = lopd_config.paper_config()
    config.teacher.checkpoint = "Qwen/Qwen3-32B"
    config.student.checkpoint = "Qwen/Qwen3-8B-Base"
    config.student.lora.rank = 32
    config.sft_data.update(prompts=5_000, samples=1, response_length=4096)
    config.sft.update(
        steps=100, batch_size=128, learning_rate=8e-4, warmup_steps=10, row_length=5120
    )
    config.opd.learning_rate = 2e-5
    config.eval.update(samples=4, response_length=8192)
    config.runtime.rows_per_micro = 1
    return lopd_config.overlaid(config, overlay)
