"""Qwen3-30B-A3B-Base taught by Qwen3-30B-A3B-Thinking-2507.

The paper's recipe for math (arXiv 2604.13010). Not yet run on accelerators by us.

Command, on 16 accelerators of 80 GB or more::

    python -m lopd.main --config=configs/qwen3_30b_a3b.py

Teacher Qwen/Qwen3-30B-A3B-Thinking-2507, student Qwen/Qwen3-30B-A3B-Base.
The paper gives no hours for this pair.
Expected, pass@1 in % of the paper: AIME24 / AIME25 / HMMT25
66.8 / 63.2 / 44.6 after SFT, 71.0 / 66.3 / 48.3 after OPD.
With an SFT model from elsewhere: `--config.sft.checkpoint=NAME --config.sft.teacher=TEACHER
--stages=precompute,opd,export,eval`; the name in `sft.teacher` must be that of
`teacher.checkpoint`.
A trial with few and short responses: `--config=configs/qwen3_30b_a3b.py:small`.
"""

from lopd import config as lopd_config


def get_config(overlay=""):
    """The recipe of `lopd.config.paper_config` with this pair of models."""
    config = lopd_config.paper_config()
    config.teacher.checkpoint = "Qwen/Qwen3-30B-A3B-Thinking-2507"
    config.student.checkpoint = "Qwen/Qwen3-30B-A3B-Base"
    # Its template opens the answer with <think>; the base student's does not.
    config.tokenizer = config.teacher.checkpoint
    config.sft.batch_size = 256  # not stated in the paper: as for 8B
    return lopd_config.overlaid(config, overlay)
