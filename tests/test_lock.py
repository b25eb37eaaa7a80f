"""The lock of a working directory: in real processes, on a disk and in a bucket."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath
from helpers import gcs_server
from helpers.commands import REPOSITORY, command, environment, refused, run

from lopd.errors import UserError
from lopd.machine import lock

HOLD = """
import sys, time
from etils import epath
from lopd.machine import lock
with lock.held(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def another_process(folder):
    """A process that holds the lock, until it is killed at the end of the block at the latest."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        env=environment() | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path, monkeypatch):
    if request.param == "disk":
        yield epath.Path(tmp_path / "w")
        return
    with gcs_server.serve() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        yield epath.Path(f"gs://{gcs_server.BUCKET}/w")


def test_the_second_is_told_who_holds_it(folder):
    with another_process(folder) as first:
        said = rf"in use by process {first.pid} on .*, since 20.* UTC"
        with pytest.raises(UserError, match=said), lock.held(folder):
            pass
        first.kill()  # and whoever comes then takes over at once
        first.wait()
        began = time.monotonic()
        with lock.held(folder):
            assert time.monotonic() - began < 5
    assert not (folder / lock.LOCK).exists()
    with lock.held(folder):
        pass


def elsewhere(beat: int) -> str:
    """The file of a process on another host."""
    holder = lock._Holder("far", 17, "2026-01-01", "another boot pid:[1]", "token")
    return holder.text(beat)


def test_a_holder_elsewhere_that_lives_is_left_alone(folder, monkeypatch):
    monkeypatch.setattr(lock, "_POLL", 0.05)
    folder.mkdir(parents=True)
    (folder / lock.LOCK).write_text(elsewhere(0))
    ended = threading.Event()

    def live():
        beat = 0
        while not ended.wait(0.1):
            beat += 1
            (folder / lock.LOCK).write_text(elsewhere(beat))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        said = "in use by process 17 on far, since 2026-01-01"
        with pytest.raises(UserError, match=said), lock.held(folder):
            pass
    finally:
        ended.set()
        thread.join()


def test_a_holder_elsewhere_that_is_dead_is_followed(folder, monkeypatch, capsys):
    monkeypatch.setattr(lock, "_POLL", 0.05)
    monkeypatch.setattr(lock, "_DEAD_AFTER", 0.3)
    folder.mkdir(parents=True)
    (folder / lock.LOCK).write_text(elsewhere(0))
    with lock.held(folder):
        assert json.loads((folder / lock.LOCK).read_text())["pid"] == os.getpid()
    assert "process 17 on far has left its lock" in capsys.readouterr().err
    assert not (folder / lock.LOCK).exists()


def test_who_was_taken_for_dead_ends(folder, monkeypatch):
    monkeypatch.setattr(lock, "_SIGN_OF_LIFE", 0.05)
    ends = threading.Event()
    monkeypatch.setattr(lock.os, "_exit", lambda code: ends.set())
    with lock.held(folder):
        time.sleep(0.2)
        assert json.loads((folder / lock.LOCK).read_text())["beat"] > 0
        (folder / lock.LOCK).write_text(elsewhere(0))
        assert ends.wait(5)


def test_a_file_that_nobody_wrote_so_is_no_holder(folder):
    folder.mkdir(parents=True)
    (folder / lock.LOCK).write_text("[]")
    with lock.held(folder):
        pass


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    below = epath.Path(tmp_path / "file" / "w")
    with pytest.raises(UserError, match="cannot be written"), lock.held(below):
        pass


def test_two_runs_at_once(tmp_path):
    """The second is refused, the first is not disturbed; killed, it is followed at once."""
    workdir = tmp_path / "w"
    first = subprocess.Popen(
        command(workdir, "teacher"), env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert "teacher" in first.stdout.readline()
    refused(run(workdir, "teacher"), str(workdir), f"in use by process {first.pid} on ", "since")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = run(workdir, "teacher")
    assert done.returncode == 0, done.stderr
    assert not (workdir / lock.LOCK).exists() and not list(workdir.rglob("*.tmp"))
