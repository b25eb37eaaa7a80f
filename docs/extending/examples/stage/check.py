"""The stage in a run that is as small as it may be."""

import json
import pathlib
import subprocess
import sys
import tempfile

workdir = pathlib.Path(tempfile.mkdtemp())
config = pathlib.Path(sys.argv[1]) / "configs" / "tiny.py"
few = [
    *(f"--config.{stage}.steps=2" for stage in ("teacher", "sft")),
    *(f"--config.{stage}.warmup_steps=0" for stage in ("teacher", "sft")),
    *(f"--config.{stage}.prompts=8" for stage in ("sft_data", "precompute")),
]
stages = "--stages=teacher,sft_data,sft,precompute,consistency"
command = [sys.executable, "-m", "lopd.main", f"--config={config}", f"--workdir={workdir}", stages]
subprocess.run([*command, *few, "--config.consistency.bins=4"], check=True)
rows = json.loads((workdir / "consistency" / "by_position.json").read_text())
assert 1 <= len(rows) <= 4 and rows[0]["tokens"] > 0
