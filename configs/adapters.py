"""OPD by low-rank adapters at small scale, with five seeds: column addition, two CPU cores.

Command::

    python -m lopd.study --config=configs/adapters.py --workdir=runs/adapters --processes=2

The settings are those of `configs/reproduction.py`. π_ref, which all arms share, is trained whole:
adapters begin with OPD, on it.
"""

import importlib.util
import pathlib

from lopd.study import Arm, Section, Study

RANKS = (2, 4, 8, 64)
"""64 is the width of the student, so that A B can be any change of a square matrix."""


def _reproduction():
    path = pathlib.Path(__file__).with_name("reproduction.py")
    spec = importlib.util.spec_from_file_location("reproduction", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def get_config():
    """The base settings."""
    return _reproduction().get_config()


def get_study(base):
    """Adapters of each rank against all weights, for the same steps."""
    rate = 10 * base.opd.learning_rate
    ranks = {f"rank_{rank}": rank for rank in RANKS}
    return Study(
        base=base,
        seeds=_reproduction().SEEDS,
        teacher_seed=20,
        teachers={"plain": {}},
        arms=[
            Arm("sft", student="sft"),
            Arm("lightning"),
            *(
                Arm(name, {"student.lora.rank": rank, "opd.learning_rate": rate})
                for name, rank in ranks.items()
            ),
        ],
        sections=[
            Section(
                "adapters",
                "Lightning OPD by adapters",
                "Rank of the adapters, at ten times the learning rate of all weights (alpha = 32, "
                "attention and MLP); `lightning` trains all weights.",
                arms=("sft", "lightning", *ranks),
                pairs=(
                    ("lightning", "sft"),
                    *((name, "sft") for name in ranks),
                    *((name, "lightning") for name in ranks),
                ),
            ),
        ],
    )
