"""The drift panel of `opd` and `online`, with the held-out responses of this run."""

from collections.abc import Callable

from lopd.cache.reader import Records
from lopd.config.catalogue import STUDENT
from lopd.data.layout import Layout
from lopd.objectives.sampled import Objective
from lopd.stages.run import Run
from lopd.training.drift import Drift, make_drift


def make_panel(
    run: Run,
    layout: Layout,
    objective: Objective,
    transform: Callable[[dict], dict] | None = None,
) -> Drift:
    """The drift panel, with the held-out T = 1 responses if that stage has run.

    `transform` is what was done to the records that are trained on.
    """
    heldout = None
    if run.exists("heldout"):
        heldout = list(Records(run.input("heldout")))
        heldout = [transform(record) for record in heldout] if transform else heldout
    return make_drift(
        run.model(STUDENT),
        objective,
        run.mesh,
        every=run.settings.runtime.drift_every,
        heldout=heldout,
        layout=layout,
    )
