"""The limited process: replies, limits, losses, and signals that are not for it."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from lopd.errors import UserError
from lopd.tasks import sandbox
from lopd.tasks.sandbox import Sandbox

WORKER = """
import mmap, os, pathlib, signal, subprocess, sys, time

print("what a worker prints is no reply")
state = {"requests": 0}

def answer(request):
    state["requests"] += 1
    state["began"] = time.process_time()
    kind = request["do"]
    if kind == "sleep":
        time.sleep(60)
    if kind in ("integer power", "busy") and "mark" in request:
        with open(request["mark"], "a") as file:
            file.write("1")
    if kind == "busy":
        while True:
            pass
    if kind == "half a second":
        while time.process_time() < state["began"] + 0.5:
            pass
    if kind == "integer power":
        9 ** (9 ** 9)
    if kind == "memory":
        mmap.mmap(-1, 8 << 30)
    if kind == "die":
        os._exit(3)
    if kind == "die once" and not pathlib.Path(request["mark"]).exists():
        pathlib.Path(request["mark"]).touch()
        os._exit(3)
    if kind == "deaf sleep":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(60)
    if kind == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        return {"child": child.pid}
    return {"pid": os.getpid(), "requests": state["requests"], "path": sys.path[0], "ü": "é"}
"""


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    return tmp_path / "worker.py"


@pytest.fixture
def box(worker):
    with Sandbox(worker, seconds=1, wall_seconds=1, memory_bytes=2 << 30) as box:
        yield box


def running(pid: int) -> bool:
    """Whether a process is there and not a mere entry that nobody has asked after."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def gone(pid: int) -> bool:
    """Whether a process has ended, within 5 s."""
    end = time.monotonic() + 5
    while running(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not running(pid)


def test_one_process_answers_all_requests_and_ends_with_the_sandbox(worker):
    with Sandbox(worker, seconds=5) as box:
        first, second = box.ask({"do": ""}), box.ask({"do": ""})
        assert first["pid"] == second["pid"] != os.getpid()
        assert (first["requests"], second["requests"], box.lost) == (1, 2, 0)
        assert first["ü"] == "é" and first["path"] != str(worker.parent)
    assert gone(first["pid"])
    assert box.ask({"do": ""})["requests"] == 1  # and starts again
    box.close()


@pytest.mark.parametrize("kind", ["sleep", "memory", "die"])
def test_what_is_lost_twice_has_no_reply_and_is_counted(box, kind):
    assert box.ask({"do": kind}) is None and box.lost == 1
    assert box.ask({"do": ""})["requests"] == 1 and box.lost == 1


@pytest.mark.parametrize("kind", ["integer power", "busy"])
def test_what_has_had_its_processor_time_is_not_asked_again(worker, tmp_path, kind):
    with Sandbox(worker, seconds=1, wall_seconds=60) as box:
        assert box.ask({"do": kind, "mark": str(tmp_path / "mark")}) is None and box.lost == 1
        assert (tmp_path / "mark").read_text() == "1"
        assert box.ask({"do": ""})["requests"] == 1


def test_a_machine_that_stands_still_loses_nothing(worker):
    """A stopped process stands for one that others leave no processor: its time by the clock goes
    by, its processor's does not."""
    with Sandbox(worker, seconds=1) as box:
        pid = box.ask({"do": ""})["pid"]
        stopped = threading.Timer(0.1, os.kill, (pid, signal.SIGSTOP))
        resumed = threading.Timer(2.5, os.kill, (pid, signal.SIGCONT))
        stopped.start(), resumed.start()
        reply = box.ask({"do": "half a second"})
        assert (reply["pid"], reply["requests"], box.lost) == (pid, 2, 0)


def test_what_is_lost_once_is_asked_again(box, tmp_path):
    reply = box.ask({"do": "die once", "mark": str(tmp_path / "mark")})
    assert reply["requests"] == 1 and box.lost == 0


def test_a_process_that_died_in_between_is_replaced(box):
    pid = box.ask({"do": ""})["pid"]
    os.kill(pid, signal.SIGKILL)
    assert box.ask({"do": ""})["pid"] != pid and box.lost == 0


def test_one_that_has_put_its_alarm_off_is_ended_by_the_parent(worker, monkeypatch):
    monkeypatch.setattr(sandbox, "_GRACE", 0.5)
    with Sandbox(worker, seconds=1, wall_seconds=1) as box:
        start = time.monotonic()
        assert box.ask({"do": "deaf sleep"}) is None
        assert 3 <= time.monotonic() - start < 30


def test_what_a_worker_started_ends_with_it(box):
    child = box.ask({"do": "child"})["child"]
    assert running(child)
    start = time.monotonic()
    box.close()
    assert gone(child) and time.monotonic() - start < 20


SIGNALLED = """
import os, signal, sys, time
from lopd.tasks.sandbox import Sandbox
signal.signal(signal.SIGINT, lambda *_: None)
signal.signal(signal.SIGTERM, lambda *_: None)
with Sandbox(sys.argv[1], seconds=20) as box:
    before = box.ask({"do": ""})["pid"]
    os.killpg(0, signal.SIGINT)      # Ctrl-C in a terminal: the whole process group
    os.kill(before, signal.SIGTERM)  # a scheduler that stops every process of a job
    os.kill(before, signal.SIGINT)
    time.sleep(0.2)
    after = box.ask({"do": ""})
    print(after["pid"] == before, after["requests"], box.lost)
"""


def test_signals_to_the_group_or_the_job_do_not_reach_a_request(worker):
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(worker)],
        capture_output=True, text=True, timeout=60, start_new_session=True,
    )  # fmt: skip
    assert done.stdout == "True 2 0\n", done.stderr


ORPHAN = """
import os, sys, threading, time
from lopd.tasks.sandbox import Sandbox
box = Sandbox(sys.argv[1], seconds=2)
print(box.ask({"do": ""})["pid"], flush=True)
threading.Thread(target=box.ask, args=({"do": "integer power"},), daemon=True).start()
time.sleep(0.2)
os._exit(0)
"""


def test_a_process_without_parent_ends_too(worker):
    """By its own alarm, in the middle of a long operation of the interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN, str(worker)], capture_output=True, text=True, timeout=60
    )
    assert gone(int(done.stdout)), done.stderr


def test_a_worker_that_cannot_be_loaded_is_one_line(tmp_path):
    (tmp_path / "bad.py").write_text("import no_such_module\n")
    with pytest.raises(UserError, match=r"the process does not start: .*bad\.py"):
        Sandbox(tmp_path / "bad.py", seconds=1).ask({})
