import html.parser
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers import chromium

from lopd import pipeline, preflight, report
from lopd.artefacts.artefact import Artefact
from lopd.artefacts.manifest import FORMAT_VERSION, Manifest
from lopd.config import STAGES, base_config, read_settings
from lopd.errors import UserError
from lopd.machine import shutdown
from lopd.report import __main__ as report_main
from lopd.report import panels, reading, texts
from lopd.report.plots import smoothed

NASTY = '</script><script>alert("x")</script><!-- <img src=x onerror=alert(1)> &amp; \u2028'
TOKENS = ["1", "+", "2", "<b>", "\n", "</script>", "</s>"]


def rollouts(count=5, length=12, seed=0) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        teacher, ref, student = (np.round(-rng.exponential(1, length), 4) for _ in range(3))
        rows.append(
            {
                "prompt_id": 100 + i,
                "sample_id": i % 2,
                "prompt": f"{NASTY} {i}",
                "tokens": [TOKENS[(i + j) % len(TOKENS)] for j in range(length)],
                "finished": i % 2 == 0,
                "teacher_logprobs": teacher.tolist(),
                "ref_logprobs": ref.tolist(),
                "student_logprobs": student.tolist(),
            }
        )
    return rows


def metrics(steps=60, seed=0) -> list[dict]:
    rng = np.random.default_rng(seed)
    names = ("loss", "advantage", "clipped", "entropy", "grad_norm", "kl_teacher", "kl_ref")
    names += ("learning_rate", "tokens")
    return [
        {"step": s, **{name: float(rng.uniform(0.1, 1)) for name in names}}
        for s in range(1, steps + 1)
    ]


def result(accuracy, n=50) -> dict:
    return {"accuracy": accuracy, "n": n, "ci95": [accuracy - 0.05, accuracy + 0.05],
            "temperature": 0.0, "mean_response_tokens": 12.5, "finished": 0.98}  # fmt: skip


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def save_manifest(folder, manifest) -> None:
    artefact = Artefact(folder)
    artefact.manifest = Manifest.from_json(manifest)
    artefact.save()


def write_stage(workdir, name, complete=True, inputs=None, **settings) -> None:
    folder = workdir / name
    folder.mkdir(parents=True)
    manifest = {
        "format_version": FORMAT_VERSION,
        "stage": name,
        "complete": complete,
        "code_version": "0.1.0",
        "settings": {"seed": 3, name: {"steps": 60} | settings},
        "inputs": inputs or {},
        "outputs": {"fingerprint": f"{name}-print"} if complete else {},
        "seconds": 90.0 if complete else 0.0,
    }
    if name == "opd":
        manifest["rounds"] = [
            {"start": 20, "ess_fraction": 0.4},
            {"start": 40, "ess_fraction": None},
        ]
        manifest["outputs"]["costs"] = {
            "sampling": {"seconds": 75.0, "tokens": 300, "flops": 9.996e11},
            "training": {"seconds": 5.25, "tokens": 100.0, "flops": 1.3264e11},
        }
    if name == "precompute":
        consistency = {"mean_log_ratio": -0.07093, "far": 0.01, "unlikely": 0.0}
        manifest["outputs"]["teacher_consistency"] = consistency
    save_manifest(folder, manifest)
    if name in reading.TRAINING:
        (folder / "metrics.jsonl").write_text(lines(metrics()))


def write_run(workdir, tau=1.0, opd=0.8):
    """A finished run whose texts try to break out of the page."""
    for name in STAGES:
        inputs = {"opd": {"sft": "sft-print", "precompute": "another"}}.get(name)
        write_stage(workdir, name, inputs=inputs, **({"tau": tau} if name == "opd" else {}))
    models = {"base": 0.05, "sft": 0.5, "control": 0.55, "opd": opd, "teacher": 0.95}
    summary = {
        "split": "test",
        "models": {m: {"task/greedy": result(a)} for m, a in models.items()},
    }
    (workdir / "eval" / "summary.json").write_text(json.dumps(summary))
    for model in models:
        row = {"mode": "greedy", "problem": 0, "sample": 0, "prompt": NASTY, "response": NASTY,
               "answer": "<i>3</i>", "correct": model == "opd", "finished": True}  # fmt: skip
        (workdir / "eval" / f"responses_{model}.jsonl").write_text(lines([row]))
    (workdir / "opd" / "rollouts.jsonl").write_text(lines(rollouts()))
    return workdir


class Parsed(html.parser.HTMLParser):
    """The tags of a page with their attributes, its text, and the content of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts, self._inside = [], "", [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += f" {data}"

    @property
    def data(self):
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("report") / "first")


@pytest.fixture(scope="module")
def whole(run):
    path = report.write_report([run])
    assert str(path) == str(run / "report.html")
    return Parsed(path.read_text())


def test_page_shows_figures_states_and_fingerprints(whole):
    text = " ".join(whole.text.split())
    assert "80.0 [75.0, 85.0]" in text and "50.0 [45.0, 55.0]" in text
    assert "+30.0" in text and "+25.0" in text  # over SFT, over the control
    assert "cache refreshed after step 20, 40" in text.replace("\u00a0", " ")
    plain = text.replace("\u00a0", " ")
    assert "sampling: 1 TFLOPs in 1 min 15 s · training: 133 GFLOPs in 5.2 s" in plain
    assert "teacher consistency: mean log(π T /π ref ) −0.071 nats" in plain
    assert "15 min 00 s" in text and "10 of 10 stages complete" in text
    assert all(f"{stage}-print" in text for stage in ("teacher", "sft", "precompute", "opd"))
    reads = {a["title"]: a["class"] for tag, a in whole.tags if "print" in a.get("title", "")}
    assert reads["sft sft-print: the one in this folder"] == "same"
    assert any("NOT the one" in a.get("title", "") for _, a in whole.tags)  # the other cache
    assert "Not recorded: importance weight of tokens, importance weight of responses" in text
    assert all(f" {title} " in text for title in ("Loss", "Entropy", "Gradient norm"))
    other = text[text.rindex(" Other training ") : text.rindex(" Settings and fingerprints ")]
    assert all(f" {stage} · " in other for stage in ("teacher", "sft", "control"))
    online = other[other.index(" online · the same on fresh rollouts") :]
    names = ("Loss", "Advantage", "Divergence estimate", "Gradient norm")
    places = [online.index(f" {n} ") for n in (*names, "Learning rate, throughput")]
    assert places == sorted(places) and places[-1] < online.rindex(" Learning rate ")
    assert "KL(π ref ‖π θ )" in text and "KL(π ref ‖π θ )" not in online


def test_page_is_self_contained(whole, run):
    for tag, attributes in whole.tags:
        assert tag not in ("link", "img", "iframe", "object") or attributes["href"] == "data:,"
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            value = attributes.get(name, "#")
            assert value.startswith("#") or value == "data:,", (tag, name, value)
    text = (run / "report.html").read_text()
    assert "@import" not in text
    assert all(part.startswith("#") for part in text.split("url(")[1:])
    ids = [a["id"] for _, a in whole.tags if "id" in a]
    used = {a["href"][1:] for _, a in whole.tags if a.get("href", "").startswith("#")}
    assert used <= {*ids}
    labelled = [a for tag, a in whole.tags if tag == "svg"]
    assert len(labelled) > 10 and all(a["aria-label"] for a in labelled)


def test_text_from_data_stays_text(whole):
    assert [tag for tag, _ in whole.tags].count("script") == 2  # the data and the code
    assert not [tag for tag, _ in whole.tags if tag == "img"]
    assert not any(name.startswith("on") for _, a in whole.tags for name in a)
    clean = NASTY.replace("\u2028", "")
    assert whole.data["rollouts"][0]["prompt"] == f"{clean} 0"
    assert whole.data["rollouts"][1]["tokens"][4] == "</script>"
    problem = whole.data["evaluation"]["problems"][0]
    assert problem["answer"] == "<i>3</i>"
    assert problem["models"]["opd"]["greedy"] == [clean, True, True]


def test_labels_of_runs_are_escaped(tmp_path):
    run = write_run(tmp_path / "<script>bad")
    text = report.write_report([run]).read_text()
    assert "<script>bad" not in text and "&lt;script&gt;bad" in text


def test_rollout_statistics_are_those_of_plain_loops(run):
    rows = rollouts()
    shares, totals, counts = {}, [0.0] * panels.BINS, [0] * panels.BINS
    for row in rows:
        for i, (t, r) in enumerate(zip(row["teacher_logprobs"], row["ref_logprobs"], strict=True)):
            shares.setdefault(row["tokens"][i], []).append(abs(t - r))
            place = math.floor(i / len(row["tokens"]) * panels.BINS)
            totals[place] += t - r
            counts[place] += 1
    found = {t["token"]: t for t in panels.heaviest_tokens(reading.read_run(run, "x"))}
    whole = sum(map(sum, shares.values()))
    for token, values in shares.items():
        assert found[token]["count"] == len(values)
        assert found[token]["before"] == pytest.approx(sum(values) / len(values))
        assert found[token]["share"] == pytest.approx(sum(values) / whole)
    (plot, histogram) = panels.advantage_plots([reading.read_run(run, "x")])
    expected = [t / n if n else None for t, n in zip(totals, counts, strict=True)]
    shown = plot.hover["series"][0]["y"]
    assert [v is None for v in shown] == [v is None for v in expected]
    assert [v for v in shown if v] == pytest.approx([v for v in expected if v], rel=1e-3)
    assert sum(histogram.hover["series"][0]["y"]) == pytest.approx(100, rel=1e-3)


def test_drift_panel_and_held_out_values_are_drawn(tmp_path):
    run = write_run(tmp_path / "run")
    held_out = {"loss": 0.5, "ess_fraction": 0.9, "ess_fraction_ci95": [0.8, 1.0], "sequences": 8}
    rows = [
        {
            "step": step,
            "heldout": held_out if step else None,
            "advantage_histogram": {"edges": [-1, 0, 1], "counts": [3, 1]},
            "advantage_by_position": [0.1 * step] * 19 + [0.0],
            **({"entropy_by_position": [0.5] * 20} if step else {}),
            "position_counts": [4] * 19 + [0],
        }
        for step in (0, 30, 60)
    ]
    (run / "opd" / "drift.jsonl").write_text(lines(rows))
    parsed = Parsed(report.write_report([run]).read_text())
    assert "held-out responses, sampled at T = 1" in parsed.text
    series = [plot["series"] for plot in parsed.data["plots"]]
    labels = [[s["label"] for s in plot] for plot in series]
    assert ["Loss", "held out"] in labels
    assert ["held out"] in labels  # what only the held-out slice has, in %
    assert [90, 90] in [plot[0]["y"] for plot in series if plot[0]["label"] == "held out"]
    position, histogram = (p for p in series if p[0]["label"] == "step 0")
    (entropy,) = (p for p in series if [s["label"] for s in p] == ["step 30", "step 60"])
    assert entropy[1]["y"] == [0.5] * 19 + [None]
    assert " Entropy along a response " in parsed.text
    assert [s["label"] for s in position] == ["step 0", "step 30", "step 60"]
    assert position[2]["y"] == pytest.approx([6.0] * 19 + [None])
    assert histogram[0]["y"] == [75, 25]


def test_several_test_sets_are_told_apart(tmp_path):
    run = write_run(tmp_path / "run")
    row = {"mode": "greedy", "problem": 0, "sample": 0, "prompt": "p", "answer": "3",
           "response": "r", "correct": True, "finished": True}  # fmt: skip
    rows = [row | {"test": "aime24"}, row | {"test": "aime25", "correct": False}]
    rows += [row | {"test": "aime25", "sample": 1}]
    (run / "eval" / "responses_opd.jsonl").write_text(lines(rows))
    evaluation = Parsed(report.write_report([run]).read_text()).data["evaluation"]
    assert {"aime24", "aime25"} < {*evaluation["tests"]}
    verdicts = {p["test"]: p["models"]["opd"]["greedy"][1] for p in evaluation["problems"]
                if "opd" in p["models"]}  # fmt: skip
    assert verdicts == {"aime24": True, "aime25": False}


@pytest.mark.parametrize("keep", ["teacher", "opd", "eval", "export"])
def test_partial_run_says_what_is_missing(tmp_path, keep):
    write_stage(tmp_path / "run", keep, complete=False)
    path = tmp_path / "run" / keep
    if keep == "opd":
        (path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    if keep == "eval":
        manifest = Artefact(path).manifest
        results = {"sft": {"task/greedy": result(0.25)}}
        save_manifest(path, manifest.to_json() | {"results": results})
    text = " ".join(Parsed(report.write_report([tmp_path / "run"]).read_text()).text.split())
    assert f"Not finished: {keep}." in text
    assert "Not in this folder: " in text
    left_out = "opd/metrics.jsonl: left out line 2 (not JSON, or cut)"
    assert (left_out in text) == (keep == "opd")
    assert ("25.0 [20.0, 30.0]" in text) == (keep == "eval")


def test_damaged_manifest_is_a_note(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "sft" / "manifest.json").write_text("{")
    text = Parsed(report.write_report([run]).read_text()).text
    assert "sft/manifest.json is damaged" in text and "80.0" in text


@pytest.mark.parametrize("bad", [1, 2])
def test_failure_is_shown_until_the_run_is_past_it(tmp_path, bad):
    run = write_run(tmp_path / "run")
    records = [{"prompt_id": 700 + i, "sample_id": i, "loss": "nan", "grad_norm": "1.0",
                "finite": i >= bad} for i in range(2)]  # fmt: skip
    failure = {"step": 61, "loss": "nan", "grad_norm": "1.23456789", "records": records}
    (run / "opd" / "failure.json").write_text(json.dumps(failure))
    save_manifest(run / "opd", Artefact(run / "opd").manifest.to_json() | {"complete": False})
    parsed = Parsed(report.write_report([run]).read_text())
    text = " ".join(parsed.text.split())
    assert "opd failed at step 61 Not finite: loss nan, gradient norm 1.235." in text
    assert ("1 of the step’s 2 records does it alone, prompt_id/sample_id 700/0" in text) == (
        bad == 1
    )
    assert ("the weights are more likely to blame than a record" in text) == (bad == 2)
    assert "The state before it is checkpoint 60" in text and "Not finished: opd." in text
    assert text.index("opd failed") < text.index("OPD accuracy")
    (run / "opd" / "failure.json").write_text(json.dumps(failure | {"step": 60}))
    assert "failed" not in Parsed(report.write_report([run]).read_text()).text


def test_comparison_names_what_differs(run, tmp_path):
    other = write_run(tmp_path / "second", tau=10.0, opd=0.7)
    path = report.write_report([run, other])
    assert str(path) == str(run / "comparison.html")
    parsed = Parsed(path.read_text())
    text = " ".join(parsed.text.split())
    differences = text[text.index("Settings that differ") : text.index("Accuracy In %")]
    assert "opd.tau 1 10" in differences and "seed" not in differences
    assert "80.0 [75.0, 85.0]" in text and "70.0 [65.0, 75.0]" in text
    loss = parsed.data["plots"][0]["series"]
    assert [(s["label"], s["colour"]) for s in loss] == [("first", 1), ("second", 2)]
    assert {r["run"] for r in parsed.data["rollouts"]} == {0, 1}
    again = write_run(tmp_path / "elsewhere" / "second")
    runs = reading.read_runs([other, again])
    assert runs[0].label.endswith("/second") and runs[1].label == "elsewhere/second"
    with pytest.raises(UserError, match="twice"):
        reading.read_runs([other, other])


@pytest.mark.parametrize("first", [True, False])
def test_comparison_of_runs_with_other_stages(run, tmp_path, first):
    other = write_run(tmp_path / "second")
    for name in ("online", "control"):
        shutil.rmtree(other / name)
    runs = [run, other] if first else [other, run]
    text = " ".join(Parsed(report.write_report(runs).read_text()).text.split())
    stages = text[text.index("State and time of each") :]
    whole, absent = stages.split(" online ")[1].split(" control ")[0], " control "
    assert ("absent" in whole) and absent in stages


def test_page_of_a_large_run_stays_small(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "opd" / "rollouts.jsonl").write_text(lines(rollouts(count=64, length=2048)))
    for stage in reading.TRAINING:
        (run / stage / "metrics.jsonl").write_text(lines(metrics(steps=3000)))
    row = {"mode": "greedy", "sample": 0, "prompt": "p" * 300, "response": "r" * 4000,
           "answer": "3", "correct": True, "finished": True}  # fmt: skip
    rows = [row | {"problem": i} for i in range(500)]
    (run / "eval" / "responses_opd.jsonl").write_text(lines(rows))
    path = report.write_report([run])
    assert path.stat().length < 3_000_000
    assert "17 of 64, to keep the page small" in path.read_text()


def test_same_page_is_not_written_again(run):
    before = os.stat(report.write_report([run])).st_mtime_ns
    assert os.stat(report.write_report([run])).st_mtime_ns == before


def test_smoothing_follows_the_data_and_not_its_spikes():
    line = np.linspace(0, 1, 200)
    spiky = line.copy()
    spiky[[50, 120]] = 1000, np.nan
    assert np.abs(smoothed(spiky) - line)[10:-10].max() < 0.01
    assert len(smoothed(np.array([3.0]))) == 1


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (texts.number(999), "999"),
        (texts.number(1_234_567), "1.23 M"),
        (texts.number(0.01234), "0.0123"),
        (texts.flops(0), "0 MFLOPs"),
        (texts.flops(9.996e14), "1 PFLOPs"),
        (texts.flops(3.456e21), "3,460 EFLOPs"),
        (texts.duration(4.64), "4.6 s"),
        (texts.duration(59.7), "1 min 00 s"),
        (texts.duration(7499), "2 h 04 min"),
        (texts.signed(-1.25, 1), "−1.2"),
        (texts.setting(1e-8), "1e-08"),
        (texts.setting(1e6), "1000000"),
    ],
)
def test_numbers_have_sensible_digits(shown, expected):
    assert shown == expected


def test_command_line(run, tmp_path, monkeypatch, capsys):
    done = subprocess.run(
        [sys.executable, "-m", "lopd.report", str(run)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(run / "report.html")), done.stderr
    for path in (tmp_path / "nowhere", tmp_path):  # no folder; no run in it
        monkeypatch.setattr(sys, "argv", ["lopd.report", str(path)])
        with pytest.raises(SystemExit) as stopped:
            report_main.main()
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and str(path) in error
        assert error.startswith("lopd: error: ") and error.count("\n") == 1


def test_failing_report_is_a_warning(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    (run / "report.html").mkdir()
    assert report.write_after_run(run) is None
    warning = capsys.readouterr().err
    assert warning.startswith("lopd: warning: no report (") and warning.count("\n") == 1


@pytest.mark.parametrize(("seconds", "pages"), [(0.0, 1), (3.0, 1), (20.0, 0)])
def test_stopped_run_writes_its_page_if_there_is_time(tmp_path, monkeypatch, seconds, pages):
    """A machine that is taken away gives half a minute, of which saving may take most; a second
    signal does not end the process before it has said that its work is safe."""
    write = report.write_after_run

    def stop(*_):
        raise shutdown.Stopped

    def write_under_fire(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments)

    monkeypatch.setattr(report, "write_after_run", write_under_fire)

    for check in ("check_settings", "check_artefacts"):
        monkeypatch.setattr(preflight, check, lambda *_: None)
    monkeypatch.setattr(pipeline, "run_stage", stop)
    monkeypatch.setattr(shutdown, "seconds_since_request", lambda: seconds)
    write_stage(tmp_path, "teacher", complete=False)
    with pytest.raises(shutdown.Stopped):
        pipeline.run(read_settings(base_config()), str(tmp_path), ("teacher",))
    assert len([*tmp_path.glob("report.html")]) == pages


# Walks through what a reader can do, for the console to be silent about all of it.
USE = """
for (const figure of document.querySelectorAll("[data-plot]")) {
  figure.focus();
  figure.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
}
document.querySelector("input[value=after]").click();
const search = document.querySelector("#rollouts input[type=search]");
for (const text of ["no such text", ""]) {
  search.value = text;
  search.dispatchEvent(new Event("input", { bubbles: true }));
  if (text) window.found = document.getElementById("rollout-count").textContent;
}
for (const select of document.querySelectorAll("select")) {
  for (const option of [...select.options].reverse()) {
    select.value = option.value;
    select.dispatchEvent(new Event("change", { bubbles: true }));
  }
}
for (const details of document.querySelectorAll("details")) details.open = true;
document.title = window.found;
"""


def test_page_works_in_a_browser(run):
    """On a laptop and a phone, light and dark: scripts run, what they make is there and fits, the
    console is silent, nothing is fetched."""
    if not chromium.executable():
        pytest.skip("no chromium on this machine")
    path = report.write_report([run])
    views = chromium.look(path, USE)
    assert [(view.width, view.scheme) for view in views] == chromium.VIEWS
    for view in views:
        assert view.requests == [f"file://{path}"] and view.console == []
        assert view.content_width <= view.width
        parsed = Parsed(view.html)
        assert [a.get("class") for tag, a in parsed.tags if tag == "article"] == ["item"] * 6
        assert "5 of 5 rollouts" in parsed.text and "1 of 1 problems" in parsed.text
        assert "<title>0 of 5 rollouts</title>" in view.html
        assert len([a for _, a in parsed.tags if "data-i" in a]) == 60
        assert 'alert("x")' in parsed.text  # shown, not run
    assert {view.scheme: view.background for view in views} == {
        "light": "rgb(247, 248, 249)", "dark": "rgb(14, 17, 21)"
    }  # fmt: skip


def test_browser_test_sees_what_is_wrong(tmp_path):
    if not chromium.executable():
        pytest.skip("no chromium on this machine")
    page = tmp_path / "page.html"
    page.write_text(
        "<meta name='viewport' content='width=device-width'><div style='width: 600px'>wide</div>"
        "<img src='http://127.0.0.1:9/picture.png'><script>nothing.there()</script>"
    )
    for view in chromium.look(page):
        assert view.requests[1:] == ["http://127.0.0.1:9/picture.png"]
        assert any("nothing is not defined" in text for text in view.console)
        assert (view.content_width > view.width) == (view.width == 390)


@pytest.mark.parametrize(
    ("objective", "label"),
    [("log_ratio", "Huber loss, nats²"), ("forward_kl", "KL(π_T‖π_θ), nats")],
)
def test_the_loss_has_the_name_of_its_objective(tmp_path, objective, label):
    write_stage(tmp_path, "opd", objective=objective)
    write_stage(tmp_path, "sft")
    runs = [reading.read_run(tmp_path, "one")]
    labels = {
        stage: [panel.y_label for panel in panels.stage_panels(runs, stage)]
        for stage in ("opd", "sft")
    }
    assert labels["opd"][0] == label
    assert labels["sft"][0] == "cross-entropy, nats per token"


# Odd rows in every file that a page is made from, one at a time. Each: the file, what stands in it
# (a function of its rows, or its bytes), and words of the note.


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run with two rows in each file, so that pages are quick."""
    run = tmp_path_factory.mktemp("odd") / "run"
    for name in ("sft", "opd", "eval"):
        write_stage(run, name)
    scalars = [{"step": i, "loss": 0.5, "tokens": 7} for i in (1, 2, 3)]
    held_out = {"loss": 0.5, "chi2": 0.9, "chi2_ci95": [0.8, 1.0]}
    panel = {"advantage_histogram": {"edges": [-1, 0, 1], "counts": [3, 1]}, "heldout": held_out,
             "advantage_by_position": [0.1, 0.2], "position_counts": [4, 0]}  # fmt: skip
    response = {"mode": "greedy", "problem": 0, "sample": 0, "prompt": "p", "response": "r",
                "answer": "3", "correct": True, "finished": True}  # fmt: skip
    for name in ("sft", "opd"):
        (run / name / "metrics.jsonl").write_text(lines(scalars))
        rows = [response, response | {"problem": 1}]
        (run / "eval" / f"responses_{name}.jsonl").write_text(lines(rows))
    (run / "opd" / "drift.jsonl").write_text(lines({"step": i, **panel} for i in (1, 3)))
    (run / "opd" / "rollouts.jsonl").write_text(lines(rollouts(3, 6)))
    found = {name: {"task/greedy": result(0.5)} for name in ("sft", "opd")}
    (run / "eval" / "summary.json").write_text(json.dumps({"split": "dev", "models": found}))
    manifest = Artefact(run / "eval").manifest.to_json()
    save_manifest(run / "eval", manifest | {"results": {"sft": {"task/greedy": result(0.25)}}})
    return run


def change(**values):
    """The second row with other values; the value `...` takes a name out."""

    def changed(rows):
        row = {k: v for k, v in (rows[1] | values).items() if v is not ...}
        return [rows[0], row, *rows[2:]]

    return changed


METRICS_ROWS = [
    (change(loss="0.5"), 'line 2 (loss "0.5" is no number)'),
    (change(loss=[0.5]), "line 2 (loss [0.5] is no number)"),
    (change(loss={"a": 1}), "line 2 (loss {"),
    (change(loss=True), "line 2 (loss true is no number)"),
    (change(loss=10**400), "line 2 (loss out of range)"),
    (change(loss=1e300), "line 2 (loss out of range)"),
    (change(loss=math.nan), "loss of line 2 (not finite)"),
    (change(loss=-math.inf), "loss of line 2 (not finite)"),
    (change(loss=None, tokens=None), ""),  # as a figure is written that is not finite
    (change(step="2"), 'line 2 (step "2" is no count)'),
    (change(step=2.0), "line 2 (step 2.0 is no count)"),
    (change(step=None), "line 2 (step null is no count)"),
    (change(step=-2), "line 2 (step -2 is no count)"),
    (change(step=10**30), "line 2 (step 1000"),
    (change(step=...), "line 2 (step is missing)"),
    (lambda rows: [rows[0], *rows], "a row of step 1 behind that of step 1"),
    (lambda rows: [*rows[1:], rows[0]], "a row of step 1 behind that of step 3"),
    (lambda rows: [rows[0], rows[2]], "opd/metrics.jsonl has no rows of steps 2"),
    (lambda rows: [rows[0], [1, 2], *rows[1:]], "line 2 ([1, 2] is no object)"),
    (lambda rows: [rows[0], None, "x", 3, *rows[1:]], "line 2 (null is no object), line 3 ("),
    (lambda rows: [*rows, *["x"] * 9], 'line 6 ("x" is no object), and 6 more'),
    (lambda rows: [], "opd/metrics.jsonl is missing or empty"),
    (b'{"step": 1, "loss": 1}\n{"step": 2, "lo', "line 2 (not JSON, or cut)"),
    (b'{"step": 1}{"step": 2}\n', "line 1 (not JSON, or cut)"),
    (b'{"step": 1, "\xff\xfe": 1}\n', "line 1 (not UTF-8 at byte 13)"),
    (b"\x00" * 4096, "line 1 (not JSON, or cut)"),
    (b"\n\r\n  \n" + b"[" * 100_000, "line 4 (nested too deeply)"),
    (b'{"step": 1, "x": ' + b"[" * 700 + b"]" * 700 + b"}", "line 1 (nested too deeply)"),
    (change(loss=10**39), ""),
    (b'{"step": 1, "loss": ' + b"9" * 5000 + b"}", "line 1 (not JSON, or cut)"),
    (b"\xef\xbb\xbf" + b'{"step": 1}', "line 1 (not JSON, or cut)"),
    (None, "opd/metrics.jsonl: left out all of it (Is a directory)"),
]
DRIFT_ROWS = [
    (change(heldout=[1]), "line 2 (heldout [1] is no object)"),
    (change(heldout={"chi2": "x"}), 'line 2 (heldout.chi2 "x" is no number)'),
    (change(heldout={"chi2": math.inf}), "heldout.chi2 of line 2 (not finite)"),
    (change(heldout={"chi2": 1, "chi2_ci95": [1]}), "line 2 (heldout.chi2_ci95 holds 1 values)"),
    (change(heldout={"chi2": 1, "chi2_ci95": [2, 1]}), "[2, 1] is no interval"),
    (change(heldout=None), ""),
    (change(advantage_histogram={"edges": [0, 1]}), "counts is missing"),
    (change(advantage_histogram={"edges": [1, 0], "counts": [1]}), "edges do not rise"),
    (change(advantage_histogram={"edges": [0, 1], "counts": [-1]}), "counts[0] -1 is less than 0"),
    (change(position_counts=[4]), "differ in length"),
    (change(advantage_by_position="ab"), 'advantage_by_position "ab" is no list'),
    (change(step=[3]), "line 2 (step [3] is no count)"),
    (lambda rows: rows[::-1], "opd/drift.jsonl: left out a row of step 1 behind that of step 3"),
]
ROLLOUT_ROWS = [
    (change(tokens=["a"]), "tokens and teacher_logprobs and ref_logprobs"),
    (change(tokens=[]), "line 2 (tokens holds 0 values)"),
    (change(tokens=[1] * 6), "line 2 (tokens[0] 1 is no text)"),
    (change(ref_logprobs=[None] * 6), "line 2 (ref_logprobs[0] null is no number)"),
    (change(ref_logprobs=[-(10**19)] * 6), ""),
    (change(ref_logprobs=...), "line 2 (ref_logprobs is missing)"),
    (change(teacher_logprobs=[math.nan] * 6), "line 2 (teacher_logprobs[0] null is no number)"),
    (change(prompt=None), "line 2 (prompt null is no text)"),
    (change(prompt="\ud800"), "line 2 (half of a surrogate pair)"),
    (change(finished="yes"), 'line 2 (finished "yes" is neither true nor false)'),
    (lambda rows: [], "opd/rollouts.jsonl is missing or empty"),
]
RESPONSE_ROWS = [
    (change(problem="1"), 'line 2 (problem "1" is no count)'),
    (change(correct=None), "line 2 (correct null is neither true nor false)"),
    (change(response=...), "line 2 (response is missing)"),
    (change(mode={"a": 1}), "line 2 (mode {"),
    (change(test=3), "line 2 (test 3 is no text)"),
    (lambda rows: [*rows, rows[0]], "left out a second 0/greedy response 0.0"),
]
SUMMARY = [
    (b"", "eval/summary.json: left out all of it (not JSON, or cut)"),
    (b'{"split": "dev", "mod', "left out all of it (not JSON, or cut)"),
    (b"[]", "left out all of it ([] is no object)"),
    (b"{}", "eval/summary.json is missing or empty"),
    (b'{"models": 3}', "left out models (3 is no object)"),
    (b'{"models": {"opd": []}}', "left out models.opd ([] is no object)"),
    (b'{"models": {"../x": {}}}', "(no name of a model)"),
    (b'{"models": {"opd": {"t/greedy": {"accuracy": 0.5}}}}', "(n is missing)"),
    (b'{"models": {"opd": {"t": {"accuracy": "1", "n": 1, "ci95": [0, 1]}}}}', "is no number"),
    (b'{"models": {"opd": {"t": {"accuracy": 1.5, "n": 1, "ci95": [0, 1]}}}}', "between 0 and 1"),
    (b'{"models": {"opd": {"t": {"accuracy": 1, "n": 0, "ci95": [0, 1]}}}}', "(n is 0)"),
    (b'{"models": {"opd": {"t": {"accuracy": 1, "n": 1, "ci95": [NaN, 1]}}}}', "null is no number"),
    (b'{"models": {"opd": {"t": {"accuracy": 1, "n": 1, "ci95": 0.5}}}}', "ci95 0.5 is no list"),
    (b'{"models": ' + b'{"a":' * 100_000, "nested too deeply"),
]
FAILURES = [
    (b"", "opd/failure.json: left out all of it"),
    (b'{"step": 61}', "(loss is missing)"),
    (b'{"step": 61, "loss": "x", "grad_norm": 1, "records": []}', '(loss "x" is no number)'),
    (b'{"step": 61, "loss": 1, "grad_norm": 1, "records": [1]}', "(records[0] 1 is no object)"),
    (b'{"step": "61", "loss": 1, "grad_norm": 1, "records": []}', '(step "61" is no count)'),
]
ODD = [
    *(("opd/metrics.jsonl", *case) for case in METRICS_ROWS),
    *(("opd/drift.jsonl", *case) for case in DRIFT_ROWS),
    *(("opd/rollouts.jsonl", *case) for case in ROLLOUT_ROWS),
    *(("eval/responses_opd.jsonl", *case) for case in RESPONSE_ROWS),
    *(("eval/summary.json", *case) for case in SUMMARY),
    *(("opd/failure.json", *case) for case in FAILURES),
]


@pytest.mark.parametrize(("name", "content", "words"), ODD)
def test_odd_row_is_left_out_and_named(small_run, tmp_path, monkeypatch, name, content, words):
    """One note says which file and line, and the page is there with all the rest."""
    run = shutil.copytree(small_run, tmp_path / "run")
    path = run / name
    if content is None:
        path.unlink()
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(lines(content([json.loads(x) for x in path.read_text().splitlines()])))
    text = " ".join(Parsed(report.write_report([run]).read_text()).text.split())
    notes = [note for note in reading.read_run(run, "x").notes if name in note]
    assert sum("left out" in note for note in notes) <= 1
    assert all(" ".join(note.split()) in text for note in notes)
    assert words in text and (words or not notes), notes
    assert ("50.0 [45.0, 55.0]" in text) == (name != "eval/summary.json")
    assert name != "eval/summary.json" or "25.0 [20.0, 30.0]" in text  # of the manifest


def test_manifest_entries_that_cannot_be_shown_are_left_out(small_run, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")
    manifest = Artefact(run / "opd").manifest.to_json()
    outputs = {"costs": {"training": 3}, "tokens": "7", "source": 5, "fingerprint": "kept"}
    changed = {"seconds": math.inf, "outputs": outputs, "settings": {"opd": 3, "seed": []}}
    save_manifest(run / "opd", manifest | changed)
    text = " ".join(Parsed(report.write_report([run, small_run]).read_text()).text.split())
    for name in ("costs (training 3 is no object)", 'tokens ("7" is no count)'):
        assert f"outputs.{name}" in text and "kept" in text
    (run / "opd" / "manifest.json").write_text('{"a":' * 100_000)
    (run / "sft" / "manifest.json").unlink()
    (run / "sft" / "manifest.json").mkdir()
    text = Parsed(report.write_report([run]).read_text()).text
    assert "opd/manifest.json" in text and "sft/manifest.json" in text


def test_page_that_is_no_text_is_replaced(small_run, tmp_path):
    run = shutil.copytree(small_run, tmp_path / os.fsdecode(b"caf\xe9"))
    (run / "report.html").write_bytes(b"\xff")
    assert "caf?" in report.write_report([run]).read_text()


def test_page_with_notices_works_in_a_browser(small_run, tmp_path):
    if not chromium.executable():
        pytest.skip("no chromium on this machine")
    run = shutil.copytree(small_run, tmp_path / "run")
    for name in ("opd/metrics.jsonl", "opd/rollouts.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": NaN, "loss": "<b>' + "x" * 200 + '"}\n[]\n')
    results = {"sft": {"task/greedy": result(0.5, 1) | {"ungraded": 1, "finished": 0.5}}}
    (run / "eval" / "summary.json").write_text(json.dumps({"split": "dev", "models": results}))
    path = run / "eval" / "responses_sft.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(lines(row | {"correct": False, "ungraded": True} for row in rows))
    path = report.write_report([run])
    use = """
    const select = (name, value) => {
      const node = document.querySelector(`#responses select[name=${name}]`);
      node.value = value;
      node.dispatchEvent(new Event("change", { bubbles: true }));
    };
    select("verdict", "none");
    """
    for view in chromium.look(path, use):
        assert view.requests == [f"file://{path}"] and view.console == []
        assert view.content_width <= view.width
        text = Parsed(view.html).text
        assert text.count("? not graded") == 2 and "2 of 2 problems" in text
        assert "sft task/greedy 1 of 2" in text and "sft task/greedy 50%" in text
        assert view.html.count("left out line") == 2 and "<b>xxx" not in view.html
