"""The tiny run with several seeds: accuracies, differences to SFT, time and memory.

    python benchmarks/tiny_seeds.py --workdir=runs/seeds --seeds=0,1,2

Prints a Markdown table (docs/measurements/tiny.md keeps one) and writes results.json beside the
runs. Runs that are complete are not repeated.
"""

import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys

from absl import app, flags

WORKDIR = flags.DEFINE_string("workdir", "runs/seeds", "Parent of one directory per seed.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of whole runs, teacher included.")
CONFIG = flags.DEFINE_string("config", "configs/tiny.py", "The settings file.")

MODELS = ("teacher", "base", "sft", "control", "opd")


def _run(seed: str) -> dict:
    workdir = pathlib.Path(WORKDIR.value) / f"seed{seed}"
    command = [
        *(sys.executable, "-m", "lopd.main", f"--config={CONFIG.value}"),
        *(f"--workdir={workdir}", f"--config.seed={seed}"),
    ]
    subprocess.run(command, check=True)
    stages = sorted(workdir.glob("*/manifest.json"))
    seconds = {p.parent.name: json.loads(p.read_text())["seconds"] for p in stages}
    summary = json.loads((workdir / "eval" / "summary.json").read_text())
    return {"seed": seed, "models": summary["models"], "seconds": seconds}


def _table(runs: list[dict], task: str) -> str:
    lines = [f"| {task} | " + " | ".join(MODELS) + " | opd − sft | opd − control |"]
    lines.append("|" + "---|" * (len(MODELS) + 3))
    gains, control_gains = [], []
    for run in runs:
        results = {name: run["models"][name][task] for name in MODELS}
        accuracy = {name: 100 * r["accuracy"] for name, r in results.items()}
        cells = [
            f"{accuracy[m]:.1f} [{100 * results[m]['ci95'][0]:.1f}, "
            f"{100 * results[m]['ci95'][1]:.1f}]"
            for m in MODELS
        ]
        gains.append(accuracy["opd"] - accuracy["sft"])
        control_gains.append(accuracy["opd"] - accuracy["control"])
        lines.append(
            f"| seed {run['seed']} | {' | '.join(cells)} | {gains[-1]:+.1f} | "
            f"{control_gains[-1]:+.1f} |"
        )
    means = [
        statistics.mean(100 * run["models"][name][task]["accuracy"] for run in runs)
        for name in MODELS
    ]
    lines.append(
        f"| mean | {' | '.join(f'{m:.1f}' for m in means)} | {statistics.mean(gains):+.1f} | "
        f"{statistics.mean(control_gains):+.1f} |"
    )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Runs the seeds and prints the tables."""
    del argv
    runs = [_run(seed) for seed in SEEDS.value]
    path = pathlib.Path(WORKDIR.value) / "results.json"
    path.write_text(json.dumps(runs, indent=2) + "\n")
    count = next(iter(runs[0]["models"]["opd"].values()))["n"]
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"accuracy in %, [95 % interval], n = {count} held-out prompts\n")
    for task in runs[0]["models"]["opd"]:
        print(_table(runs, task) + "\n")
    totals = [f"{sum(run['seconds'].values()):.0f}" for run in runs]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"seconds per run: {', '.join(totals)}; peak memory {peak:.2f} GiB; results in {path}")


if __name__ == "__main__":
    app.run(main)
