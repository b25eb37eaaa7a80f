"""Qwen3-8B-Base taught by Qwen3-32B.

The paper's recipe for math (arXiv 2604.13010). Not yet run on accelerators by us.

Command, on 8 accelerators of 80 GB::

    python -m lopd.main --config=configs/qwen3_8b.py

Teacher Qwen/Qwen3-32B, student Qwen/Qwen3-8B-Base. The paper spends 30 H100-hours after SFT.
Expected, pass@1 in % of the paper: AIME24 / AIME25 / HMMT25
63.7 / 51.7 / 36.9 after SFT, 69.9 / 59.2 / 41.9 after OPD.
With an SFT model from elsewhere: `--config.sft.checkpoint=NAME --config.sft.teacher=TEACHER
--stages=precompute,opd,export,eval`; the name in `sft.teacher` must be that of
`teacher.checkpoint`.
A trial with few and short responses: `--config=configs/qwen3_8b.py:small`.
"""

from lopd import config as lopd_config


def get_config(overlay=""):
    """The recipe of `lopd.config.paper_config` with this pair of models."""
    config = lopd_config.paper_config()
    config.teacher.checkpoint = "Qwen/Qwen3-32B"
    config.student.checkpoint = "Qwen/Qwen3-8B-Base"
    config.sft.batch_size = 256  # the paper: 128 rows of 16,384 tokens
    return lopd_config.overlaid(config, overlay)
