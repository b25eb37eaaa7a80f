"""Commands whose standard output goes away, and signals: real processes, pipes and /dev/full."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.commands import REPOSITORY, environment

COMMANDS = {
    "main": ["lopd.main", "--config=configs/tiny.py", "--workdir={workdir}"],
    "study": ["lopd.study", "--config=configs/reproduction.py", "--workdir={workdir}"],
    "plan": ["lopd.plan", "--config=configs/tiny.py", "--topology=h100:8"],
    "cache": ["lopd.cache", "summary", "{workdir}"],
    "report": ["lopd.report", "{workdir}"],
}


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """A shell that starts the tests in the background has SIGINT ignored, by children too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# A door with work of its own: prints lines (the first is "begun"), and says at the end on a file
# that it got there.
WORK = """
import os, pathlib, sys, time
from lopd import cli
from lopd.machine import shutdown
def work():
    for i in range(int(sys.argv[3])):
        print("begun" if i == 0 else "line π", flush=True)
        print("bar", file=sys.stderr, flush=True)
        time.sleep(float(sys.argv[4]))
        shutdown.check()
    os.write(1, b"from C\\n")
    pathlib.Path(sys.argv[1]).write_text("done")
with cli.door(answers=sys.argv[2] == "answers"):
    if sys.argv[2] == "guarded":
        cli.flags.FLAGS(["x", "--workdir=" + os.path.dirname(sys.argv[1])])
        cli.guarded(work)
    else:
        with cli.one_line_errors():
            work()
"""


def start(tmp_path, kind, shell="{}", count=3, pause=0.0, **how) -> subprocess.Popen:
    command = [sys.executable, "-c", WORK, str(tmp_path / "end"), kind, str(count), str(pause)]
    line = shell.format('"$@"')
    return subprocess.Popen(
        ["bash", "-c", line, "bash", *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment(), cwd=REPOSITORY, **how,
    )  # fmt: skip


def ended(process: subprocess.Popen) -> tuple[int, str]:
    _, said = process.communicate(timeout=60)
    return process.returncode, "".join(x for x in said.splitlines(True) if x != "bar\n")


@pytest.mark.parametrize(
    ("shell", "said"),
    [
        ("{} | head -1; exit ${{PIPESTATUS[0]}}", ""),
        ("{} >&-", ""),
        ("{} >&- 2>&- <&-", ""),
        ("{} 2>/dev/full", ""),
        ("{} > >(true) 2> >(true)", ""),
        ("{} >/dev/full 2>/dev/full", ""),
        ("PYTHONIOENCODING=ascii {}", ""),
        (
            "{} >/dev/full",
            "lopd: warning: standard output cannot be written (No space left on device); "
            "the work goes on without it\n",
        ),
    ],
)
def test_work_outlives_its_standard_streams(tmp_path, shell, said):
    assert ended(start(tmp_path, "guarded", shell, pause=0.2)) == (0, said)
    assert (tmp_path / "end").read_text() == "done"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["end"]


@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ("{} | head -1; exit ${{PIPESTATUS[0]}}", 141, ""),
        ("{} >/dev/full", 2, "(No space left on device)\n"),
        ("{} >&-", 2, "(it is closed)\n"),
        ("{} >/dev/full 2>/dev/full", 2, ""),
        ("{} 2>&-", 0, ""),
        ("{} 2>/dev/full", 0, ""),
        ("PYTHONIOENCODING=ascii {}", 0, ""),
    ],
)
def test_command_that_answers_ends_with_its_reader(tmp_path, shell, code, said):
    if said:
        said = f"lopd: error: standard output cannot be written {said}"
    assert ended(start(tmp_path, "answers", shell, pause=0.2)) == (code, said)


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_in_their_doors(tmp_path, name):
    """Each says a mistake with any of its streams gone; --help into a full device."""
    module, *options = COMMANDS[name]
    base = [sys.executable, "-m", module]
    answers = name in ("plan", "cache", "report")
    done = subprocess.run(
        ["bash", "-c", '"$@" --help >/dev/full', "bash", *base], cwd=REPOSITORY,
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert "standard output cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1 and (done.returncode == 2 or not answers)
    bad = [x.format(workdir=tmp_path / "nothing") for x in options]
    bad = [*bad, "--config.nothing=1"] if "--config" in " ".join(bad) else bad
    for shell in ('"$@" 2>/dev/full', '"$@"'):
        done = subprocess.run(
            ["bash", "-c", shell, "bash", *base, *bad], cwd=REPOSITORY,
            capture_output=True, text=True, env=environment(),
        )  # fmt: skip
        assert done.returncode == 2, (shell, done)
    assert done.stderr.startswith("lopd: error: ") and done.stderr.count("\n") == 1


SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def signalled(tmp_path, kind: str, *names: str, shell="exec {}") -> tuple[int, str]:
    process = start(tmp_path, kind, shell, count=600, pause=0.1)
    assert process.stdout.readline() == "begun\n"
    for name in names:
        os.kill(process.pid, getattr(signal, name))
        time.sleep(0.02)
    return ended(process)


@pytest.mark.parametrize("name", SIGNALS)
def test_signal_to_a_run_is_a_request_in_one_line(tmp_path, name):
    code, said = signalled(tmp_path, "guarded", name)
    assert (code, said.strip()) == (75, "lopd: stopped; the same command continues from here")


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (("SIGINT", "SIGINT"), -signal.SIGINT),
        (("SIGTERM", "SIGTERM"), -signal.SIGTERM),
        (("SIGHUP", "SIGHUP"), 75),  # from the kernel and from the shell
        (("SIGTERM", "SIGHUP"), 75),  # as systemd does
    ],
)
def test_second_signal_ends_a_run_at_once_without_a_traceback(tmp_path, names, code):
    assert signalled(tmp_path, "guarded", *names)[0] == code


def test_run_under_nohup_does_not_hear_the_terminal_close(tmp_path):
    code, _ = signalled(tmp_path, "guarded", "SIGHUP", "SIGTERM", shell="trap '' HUP; exec {}")
    assert code == 75
    process = start(tmp_path, "guarded", "trap '' HUP; exec {}", count=5, pause=0.1)
    process.stdout.readline()
    os.kill(process.pid, signal.SIGHUP)
    assert ended(process) == (0, "")


@pytest.mark.parametrize("name", SIGNALS)
def test_signal_to_a_command_that_answers_is_no_traceback(tmp_path, name):
    code, said = signalled(tmp_path, "answers", name)
    expected = (130, "\nlopd: interrupted\n") if name == "SIGINT" else (-getattr(signal, name), "")
    assert (code, said) == expected


def test_terminal_that_closes_does_not_end_the_work_it_started(tmp_path):
    """The terminal of a run goes away: SIGHUP, and both streams fail with EIO."""
    import pty

    master, slave = pty.openpty()
    command = [sys.executable, "-c", WORK, str(tmp_path / "end"), "guarded", "600", "0.05"]
    process = subprocess.Popen(
        ["setsid", "--ctty", *command], stdin=slave, stdout=slave, stderr=slave,
        env=environment(), cwd=REPOSITORY,
    )  # fmt: skip
    os.close(slave)
    assert b"begun" in os.read(master, 100)
    os.close(master)
    assert process.wait(60) == 75


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("after", [0.3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_ctrl_c_while_a_command_starts_is_no_traceback(tmp_path, name, after):
    module, *options = COMMANDS[name]
    options = [x.format(workdir=tmp_path) for x in options]
    process = subprocess.Popen(
        [sys.executable, "-m", module, *options], cwd=REPOSITORY, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in said, said
    # 75: work had begun by then.
    assert process.returncode in (130, -signal.SIGINT, 2, 75), said
