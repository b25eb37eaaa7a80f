"""Writes what a study found: results.json, results.md, figures and one page."""

import json
from collections.abc import Sequence

import jax

import lopd
from lopd.machine.storage import write_atomically
from lopd.study.design import Arm, Study
from lopd.study.results import collect
from lopd.study.store import Store
from lopd.study.table import Results, markdown, tables


def _markdown(study: Study, results: Results) -> str:
    parts = []
    for section in study.sections:
        shown = [markdown(table) for table in tables(section, results)]
        if shown:
            parts += [f"## {section.title}", section.text, *shown]
    return "\n\n".join(parts) + "\n"


def write(study: Study, store: Store, arms: Sequence[Arm], seeds: Sequence[int]) -> None:
    """Writes the results of those runs of the arms with the seeds that are complete."""
    # Imported here: Matplotlib takes a second.
    from lopd.study.page import render

    runs = collect(study, store, arms, seeds)
    results = Results(runs)
    about = {
        "code_version": lopd.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "teacher_seed": study.teacher_seed,
        "seeds": [*seeds],
    }
    # A run a line: small, and a diff shows which have changed.
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs)
    text = f'{{"about": {json.dumps(about)},\n"runs": [\n{lines}\n]}}\n'
    write_atomically(store.workdir / "results.json", text)
    write_atomically(store.workdir / "results.md", _markdown(study, results))
    folder = store.workdir / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    text, images = render(study, results, about)
    for name, image in images.items():
        (folder / f"{name}.png").write_bytes(image)
    write_atomically(store.workdir / "report.html", text)
    print(f"{len(runs)} of {len(arms) * len(seeds)} runs: {store.workdir / 'report.html'}")
