"""Cut responses and ungraded answers, said at once and in the end: bar, table, page."""

import io
import json

import pytest
import tqdm
from helpers.tiny_run import open_run, run, tiny_settings

from lopd import pipeline, report
from lopd.artefacts.artefact import Artefact
from lopd.report import notices
from lopd.sampling.cut import CutCounter


def shown_after(*finished: bool) -> list[str]:
    """What a log file holds of a bar that is due every hour, after each response."""
    log = io.StringIO()
    seen = []
    with tqdm.tqdm(total=len(finished), file=log, mininterval=3600) as progress:
        counter = CutCounter(progress, also="9 tokens/s")
        for one in finished:
            counter.add(one)
            seen.append(log.getvalue())
    return seen


def test_many_cut_responses_show_on_the_bar_at_once():
    seen = shown_after(*[True] * 7, *[False] * 3, *[True] * 9)
    assert not any("CUT" in text for text in seen[:9])  # 2 of 9
    assert "9 tokens/s, 30% CUT at the length limit" in seen[9]
    few = shown_after(False, *[True] * 5, False)
    assert not any("CUT" in text for text in few)  # too few to say, then too few cut


def test_a_run_says_that_responses_are_cut(tiny_models, tmp_path, one_device, capfd):
    """Untrained models do not end: on the bar, behind the table and on top of the page."""
    settings = {"eval__prompts": 12, "eval__response_length": 4, "eval__samples": 1}
    run(tiny_models, tmp_path, "precompute", "eval", **settings)
    out, err = capfd.readouterr()
    assert "CUT at the length limit" in err
    warnings = [x for x in out.splitlines() if x.startswith("lopd: warning: ")]
    assert len(warnings) == 2 and "precompute: " in warnings[0]
    assert "were cut at precompute.response_length" in warnings[0]
    assert "cut at eval.response_length" in warnings[1] and "addition/greedy 1" in warnings[1]
    assert out.index("accuracy on addition") < out.index(warnings[0])
    page = (tmp_path / "report.html").read_text()
    top = page[page.index("<main>") : page.index('class="headline"')]
    assert top.count("<li>") == 2 and "were cut at precompute.response_length" in top
    # A summary that is cut is no matter for what a later run says.
    (tmp_path / "eval" / "summary.json").write_text('{"models": ')
    run(tiny_models, tmp_path, "precompute", **settings)
    assert "accuracy on addition" in capfd.readouterr().out


def evaluation(workdir, **figures) -> None:
    artefact = Artefact(workdir / "eval")
    artefact.begin("eval", {"eval": {"split": "test"}}, {})
    result = {"accuracy": 0.5, "n": 29, "ci95": [0.3, 0.7], "finished": 1.0, "ungraded": 3}
    artefact.manifest.results = {"sft": {"aime/greedy": result | figures}}
    row = {"mode": "greedy", "problem": 0, "sample": 0, "prompt": "p", "response": "r",
           "answer": "3", "correct": False, "ungraded": True, "finished": True}  # fmt: skip
    (workdir / "eval" / "responses_sft.jsonl").write_text(json.dumps(row) + "\n")
    artefact.finish({})


def test_ungraded_answers_are_named_in_table_and_page(tmp_path, capsys):
    evaluation(tmp_path)
    pipeline._print_summary(open_run(tmp_path, tiny_settings()), ["eval"])
    out = capsys.readouterr().out
    assert "50.0%  [30.0%, 70.0%]      29" in out
    assert "sft aime/greedy 3 of 32" in out and "could not be graded" in out
    page = report.write_report([tmp_path]).read_text()
    assert "sft aime/greedy 3 of 32" in page[page.index('class="notices"') :]
    assert '["r",null,true]' in page and '<option value="none">not graded' in page


@pytest.mark.parametrize("damage", ["{", ""])
def test_damaged_evaluation_does_not_end_a_run_that_is_done(tmp_path, capsys, damage):
    evaluation(tmp_path)
    (tmp_path / "eval" / "manifest.json").write_text(damage)
    pipeline._print_summary(open_run(tmp_path, tiny_settings()), ["eval"])
    assert "accuracy" not in (out := capsys.readouterr().out) and "results in" in out


def test_notices_are_of_what_was_sampled():
    assert notices.of_stage("sft_data", {"responses": 100, "finished": 75}, []) == []
    (said,) = notices.of_stage("sft_data", {"responses": 100, "finished": 74}, [])
    assert "sft_data: 26% of the responses were cut at sft_data.response_length" in said
    steps = [{"step": i, "truncated": x} for i, x in enumerate((0.2, None, 0.6))]
    (said,) = notices.of_stage("online", {}, steps)
    assert "online: 40%" in said and "precompute.response_length" in said
    assert notices.of_stage("opd", {}, steps) == []  # the cache's, and said there
    assert notices.of_results({"opd": {"t/greedy": {"n": 1, "accuracy": 1}}}) == []
