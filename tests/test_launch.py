"""The launchers, against stand-ins for gcloud, sbatch, srun, xpk and Python that record their calls
and fail on demand; the local one also for real, with a signal in the middle."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers.commands import BATCHES, REPOSITORY, SMALL

LAUNCH = REPOSITORY / "launch"
LAUNCHERS = {
    "local.sh": [],
    "slurm.sh": [],
    "tpu_pod.sh": ["run", "--zone=z", "--accelerator-type=v6e-16"],
    "gke.sh": ["run", "--cluster=c", "--tpu-type=v6e-16"],
}
ARGS = ["--config=a b.py", "--workdir=gs://it's", '--config.x=$HOME `id` "q"']
HOSTILE = [
    *("--config=x", "--workdir=gs://b/x", "", " ", "-n", "--", "-", "*", "[a-z]?", "~", "~root/x"),
    *(
        "$(id)",
        "`id`",
        "${HOME}",
        "$$",
        "!!",
        "a;b",
        "a&&b|c>d<e",
        "#no",
        "{a,b}",
        "a\\b\\",
        "%s%n",
    ),
    *(
        "it's",
        "''",
        '"',
        "'\"'\"'",
        "two\nlines",
        "\n",
        "'\n'$(id)\n",
        "ends in\n",
        "tab\there",
        "\r",
    ),
    *("naïve – 数学 🙂", "\x7f\x1b[31m", " PYTHON ", "a=b", "=", "x" * 5000),
]
"""Arguments that some shell on the way would change."""

# Answers a call by the first unused line of the plan whose words are all in it; else with success.
STAND_IN = f"""#!{sys.executable}
import json, os, sys
here = os.path.dirname(os.path.abspath(__file__))
name = os.path.basename(__file__)
call = [name, *sys.argv[1:]]
with open(here + "/calls.jsonl", "a") as file:
    file.write(json.dumps(call) + "\\n")
plan = json.load(open(here + "/plan.json"))
for step in plan:
    if not step.get("used") and all(any(w in a for a in call) for w in step["words"]):
        step["used"] = True
        json.dump(plan, open(here + "/plan.json", "w"))
        print(step.get("output", ""))
        sys.exit(step.get("code", 0))
"""


class StandIns:
    """Programs on PATH that do nothing but remember."""

    def __init__(self, path: pathlib.Path, *names: str):
        self.path = path
        for name in names:
            self.script(name, STAND_IN)
        self.plan([])

    def script(self, name: str, text: str) -> pathlib.Path:
        (self.path / name).write_text(text)
        (self.path / name).chmod(0o755)
        return self.path / name

    def plan(self, steps: list[dict]) -> None:
        (self.path / "plan.json").write_text(json.dumps(steps))
        (self.path / "calls.jsonl").write_text("")

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.path / "calls.jsonl").read_text().splitlines()]

    def run(self, launcher: str, *options: str, args=ARGS) -> subprocess.CompletedProcess:
        command = [str(LAUNCH / launcher), *options, *(["--", *args] if args else [])]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"PATH": f"{self.path}:{os.environ['PATH']}", "HOME": str(self.path)}

    def shell(self, script: str, shell: str = "bash") -> subprocess.CompletedProcess:
        """Runs what a launcher hands to another machine's shell."""
        return subprocess.run(
            [shell, "-c", script], capture_output=True, text=True, env=self.environment
        )


@pytest.fixture
def stand_ins(tmp_path):
    return StandIns(tmp_path, "gcloud", "sbatch", "scontrol", "xpk", "pip", "python", "python3")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_help_and_dry_run_call_nothing(stand_ins, launcher):
    options = LAUNCHERS[launcher]
    done = stand_ins.run(launcher, "--help", args=None)
    assert done.returncode == 0 and "--dry-run" in done.stdout and "-- ARGS" in done.stdout
    done = stand_ins.run(launcher, *options, "--dry-run")
    assert done.returncode == 0 and "-m" in done.stdout and "lopd.main" in done.stdout
    assert stand_ins.calls == []


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_mistakes_are_one_line_before_any_call(stand_ins, launcher):
    options = LAUNCHERS[launcher]
    for wrong in (["--nodse=2"], ["--retries=x"], ["--name=A B"]):
        done = stand_ins.run(launcher, *options, *wrong)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert wrong[0].split("=")[0] in done.stderr
    done = stand_ins.run(launcher, *options, args=["--config=x"])
    assert done.returncode == 2 and "--workdir" in done.stderr
    assert stand_ins.calls == []


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    "wrong",
    [
        *("--retries=08", "--retries=0x10", "--retries=-1", "--retries=1e3", "--retries=99999999"),
        *("--retries=", "--retries=1 ", "--retries=1\n", "--retries=٣", "--name=", "--name=-x"),
        *("--name=é", "--name=a\nb", "--name=" + "a" * 64, "--env=1A=x", "--env=-u=x", "--env==x"),
        *("--env=A B=x", "--env=A", "--env=$(id)=x", "-x", "word", "", " ", "--*", "--dry-run=1"),
    ],
)
def test_strange_options_are_one_line_before_any_call(stand_ins, launcher, wrong):
    done = stand_ins.run(launcher, *LAUNCHERS[launcher], wrong)
    assert done.returncode == 2 and done.stdout == "", (done.returncode, done.stderr)
    assert done.stderr.startswith(f"{launcher}: error: ")
    assert done.stderr.count("\n") == 1 + wrong.count("\n")
    assert stand_ins.calls == []


@pytest.mark.parametrize(
    ("launcher", "wrong"),
    [
        *(("local.sh", f"--processes={n}") for n in ("0", "02", "100000", "9" * 30, "two", "")),
        *(("local.sh", f"--devices={n}") for n in ("0", "08", "100000")),
        *(("local.sh", f"--python={p}") for p in ("no-such-python", "a=b/python", "-c", "")),
        *(("slurm.sh", f"--{key}={n}") for key in ("nodes", "gpus", "cpus") for n in ("0", "08")),
        *(("slurm.sh", x) for x in ("--python=a=b", "--logs=/dev/null/x", "--time=", "--setup=")),
        *(("tpu_pod.sh", x) for x in ("--poll=08", "--poll=x", "--zone=", "--project=")),
        *(("gke.sh", x) for x in ("--env=A=x\ny", "--cluster=", "--image=")),
    ],
)
def test_values_that_cannot_be_are_one_line_before_any_call(stand_ins, launcher, wrong):
    done = stand_ins.run(launcher, *LAUNCHERS[launcher], wrong)
    said = [x for x in done.stderr.splitlines() if x.startswith(f"{launcher}: error: ")]
    assert done.returncode == 2 and len(said) == 1, (done.returncode, done.stderr)
    assert wrong.split("=")[0] in said[0] and stand_ins.calls == []


def test_local_processes_on_gpus_are_no_more_than_there_are(stand_ins):
    stand_ins.script("nvidia-smi", "#!/bin/sh\necho GPU 0: x; echo GPU 1: x")
    done = stand_ins.run("local.sh", "--gpus", "--processes=3")
    assert done.returncode == 2 and "--processes=3 must be a number from 1 to 2" in done.stderr
    assert stand_ins.run("local.sh", "--gpus", "--processes=2").returncode == 0
    assert len(stand_ins.calls) == 3  # for a free port, and two runs


def test_shellcheck_finds_nothing():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed (apt install shellcheck)")
    scripts = sorted(map(str, LAUNCH.glob("*.sh")))
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def recorded_python(path: pathlib.Path, codes: list[int]) -> str:
    """An interpreter that writes down what it was given and ends with one code after another."""
    return f"""#!{sys.executable}
import fcntl, json, os, sys
if sys.argv[1] == "-c":
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "XLA_FLAGS", "MINE")
seen = {{name: os.environ.get(name) for name in names}}
with open({str(path)!r}, "a+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.seek(0)
    before = len(file.readlines())
    file.write(json.dumps([sys.argv[1:], seen]) + "\\n")
codes = {codes!r}
print("said by", seen["JAX_PROCESS_ID"], flush=True)
code = codes[min(before, len(codes) - 1)]
if code == "hang":
    import time
    time.sleep(60)
sys.exit(code)
"""


def run_locally(tmp_path, codes, *options):
    script = tmp_path / "interpreter"
    script.write_text(recorded_python(tmp_path / "runs.jsonl", codes))
    script.chmod(0o755)
    done = subprocess.run(
        [str(LAUNCH / "local.sh"), f"--python={script}", *options, "--", *ARGS],
        capture_output=True,
        text=True,
    )
    runs = [json.loads(x) for x in (tmp_path / "runs.jsonl").read_text().splitlines()]
    return done, runs


def test_local_starts_every_process_with_its_place_and_arguments(tmp_path):
    done, runs = run_locally(tmp_path, [0], "--processes=3", "--devices=4", "--env=MINE=a 'b")
    assert done.returncode == 0
    assert all(arguments == ["-m", "lopd.main", *ARGS] for arguments, _ in runs)
    assert sorted(seen["JAX_PROCESS_ID"] for _, seen in runs) == ["0", "1", "2"]
    assert len({seen["JAX_COORDINATOR_ADDRESS"] for _, seen in runs}) == 1
    assert {seen["MINE"] for _, seen in runs} == {"a 'b"}
    assert {seen["XLA_FLAGS"] for _, seen in runs} == {"--xla_force_host_platform_device_count=4"}
    assert "said by 0\n" in done.stdout and "[2] said by 2\n" in done.stdout


def test_local_starts_a_stopped_run_again_and_no_failed_one(tmp_path):
    done, runs = run_locally(tmp_path, [75, 75, 0], "--processes=2")
    assert (done.returncode, len(runs)) == (0, 4)
    (tmp_path / "runs.jsonl").unlink()
    done, runs = run_locally(tmp_path, [75], "--processes=1", "--retries=2")
    assert (done.returncode, len(runs)) == (75, 3)
    (tmp_path / "runs.jsonl").unlink()
    start = time.monotonic()
    done, runs = run_locally(tmp_path, ["hang", 2], "--processes=2")
    assert (done.returncode, len(runs)) == (2, 2)
    assert time.monotonic() - start < 20, "the other process was left waiting"


def find(calls: list[list[str]], *words: str) -> list[list[str]]:
    return [call for call in calls if all(any(word in part for part in call) for word in words)]


def command_in(call: list[str]) -> str:
    return next(part for part in call if part.startswith("--command="))[len("--command=") :]


GONE = {"words": ["queued-resources", "describe"], "code": 1}
TPU = ["run", "--zone=z", "--accelerator-type=v5p-32", "--poll=0"]


def is_state(state: str) -> dict:
    return {"words": ["queued-resources", "describe"], "output": state}


def node_is(state: str, times: int = 1) -> list[dict]:
    node = {"words": ["tpu-vm", "describe"], "output": state}
    return [step for _ in range(times) for step in (is_state("ACTIVE"), node)]


def not_running() -> dict:
    return {"words": ["kill -0 --", "--worker=0"], "code": 1}


def follow(code: int) -> dict:
    return {"words": ["tail -n"], "code": code}


def test_tpu_pod_from_nothing_to_the_end(stand_ins):
    plan = [GONE, is_state("WAITING_FOR_RESOURCES"), *node_is("CREATING"), *node_is("READY")]
    stand_ins.plan([*plan, not_running(), follow(0)])
    done = stand_ins.run("tpu_pod.sh", *TPU, "--spot", "--project=p", "--delete")
    assert done.returncode == 0, done.stderr
    calls = stand_ins.calls
    assert all("--zone=z" in call and "--project=p" in call for call in calls)
    (created,) = find(calls, "create")
    for flag in ("--accelerator-type=v5p-32", "--runtime-version=v2-alpha-tpuv5", "--spot"):
        assert flag in created
    order = [created, *find(calls, "scp"), *find(calls, "uv pip"), *find(calls, "nohup"),
             *find(calls, "tail -n"), *find(calls, "delete", "--force")]  # fmt: skip
    assert len(order) == 6 and [calls.index(c) for c in order] == sorted(map(calls.index, order))


def test_what_the_tpu_workers_are_told_to_run_works(stand_ins):
    """The start, follow and stop commands in a real shell, with a home directory of their own."""
    stand_ins.plan([*node_is("READY"), not_running(), follow(0)])
    assert stand_ins.run("tpu_pod.sh", *TPU, "--env=MINE=x y").returncode == 0
    start, watch = (command_in(find(stand_ins.calls, w)[0]) for w in ("nohup", "tail -n"))
    interpreter = stand_ins.path / "lopd-venv" / "bin"
    interpreter.mkdir(parents=True)
    (stand_ins.path / "lopd-code").mkdir()
    runs = stand_ins.path / "runs.jsonl"
    program = recorded_python(runs, [75, "hang"]).replace(
        "sys.exit(code)", "time.sleep(1); sys.exit(code)"
    )
    (interpreter / "python").write_text("#!/bin/sh\nexit 1")
    (interpreter / "python").write_text(program.replace("import fcntl", "import time, fcntl"))
    (interpreter / "python").chmod(0o755)
    assert stand_ins.shell(start).returncode == 0
    assert stand_ins.shell(start).returncode == 0  # it is running: left alone
    done = stand_ins.shell(watch)
    assert done.returncode == 75 and "said by" in done.stdout
    ((arguments, seen),) = [json.loads(line) for line in runs.read_text().splitlines()]
    assert arguments == ["-m", "lopd.main", *ARGS] and seen["MINE"] == "x y"

    assert stand_ins.shell(start).returncode == 0  # now it hangs
    stand_ins.plan([])
    assert stand_ins.run("tpu_pod.sh", "stop", "--zone=z", args=None).returncode == 0
    begun = time.monotonic()
    assert stand_ins.shell(command_in(stand_ins.calls[0])).returncode == 0
    assert time.monotonic() - begun < 20
    assert stand_ins.shell(watch).returncode == 128 + signal.SIGTERM


def test_tpu_pod_queues_again_after_a_preemption(stand_ins):
    plan = [*node_is("READY"), not_running(), follow(1)]
    plan += [*node_is("PREEMPTED", 2), is_state("SUSPENDED"), GONE, *node_is("READY"), follow(0)]
    stand_ins.plan(plan)
    done = stand_ins.run("tpu_pod.sh", *TPU)
    assert done.returncode == 0, done.stderr
    calls = stand_ins.calls
    assert find(calls, "delete", "--force")
    assert len(find(calls, "create")) == 1
    assert len(find(calls, "scp")) == len(find(calls, "nohup")) == 2


def test_tpu_pod_continues_a_stopped_run_on_the_same_slice(stand_ins):
    stand_ins.plan([*node_is("READY"), not_running(), follow(75), *node_is("READY"), follow(0)])
    assert stand_ins.run("tpu_pod.sh", *TPU).returncode == 0
    calls = stand_ins.calls
    assert len(find(calls, "nohup")) == 2 and len(find(calls, "scp")) == 1
    assert len(find(calls, "kill -TERM", "--worker=all")) == 1


def test_tpu_pod_gives_up_where_running_again_cannot_help(stand_ins):
    stand_ins.plan([*node_is("READY"), not_running(), follow(2), *node_is("READY")])
    assert stand_ins.run("tpu_pod.sh", *TPU).returncode == 2
    assert len(find(stand_ins.calls, "nohup")) == 1 and not find(stand_ins.calls, "delete")
    stand_ins.plan([GONE, {"words": ["create"], "code": 1}])
    done = stand_ins.run("tpu_pod.sh", *TPU)
    assert done.returncode == 2 and "could not queue" in done.stderr
    stand_ins.plan([*node_is("READY", 2), not_running(), {"words": ["scp"], "code": 1}])
    assert stand_ins.run("tpu_pod.sh", *TPU).returncode == 1
    stand_ins.plan([*node_is("READY", 9), not_running(), *[follow(75)] * 9])
    assert stand_ins.run("tpu_pod.sh", *TPU, "--retries=1").returncode == 75
    assert len(find(stand_ins.calls, "nohup")) == 2


def test_tpu_pod_follows_a_run_that_is_there(stand_ins):
    stand_ins.plan([*node_is("READY"), follow(0)])
    assert stand_ins.run("tpu_pod.sh", *TPU).returncode == 0
    assert not find(stand_ins.calls, "scp") and find(stand_ins.calls, "tail -n")


SBATCH = """#!/usr/bin/env bash
cat > "$HOME/job.sh"
printf '%s\\n' "$@" > "$HOME/options"
echo "77;cluster"
"""
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
"$@"
"""


def test_slurm_job_runs_and_is_queued_again(stand_ins, tmp_path):
    stand_ins.script(
        "sbatch",
        '#!/bin/bash\ncat > "$HOME/job.sh"\nprintf "%s\\n" "$@" > "$HOME/options"\necho "77;c"',
    )
    done = stand_ins.run(
        "slurm.sh", "--nodes=2", "--gpus=4", "--partition=p q", "--env=MINE=x y",
        "--setup=export SEEN=yes", f"--logs={tmp_path / 'logs'}", "--retries=3",
    )  # fmt: skip
    assert done.returncode == 0 and "job 77, log" in done.stdout
    options = (tmp_path / "options").read_text().splitlines()
    for flag in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--partition=p q",
                 "--signal=TERM@300", "--requeue"):  # fmt: skip
        assert flag in options
    stand_ins.script("srun", SRUN)
    job = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "0"}
    for code, count, requeued in ((0, "0", 0), (75, "0", 1), (75, "3", 0), (2, "0", 0)):
        stand_ins.plan([{"words": ["python3"], "code": code}])
        environment = stand_ins.environment | job | {"SLURM_RESTART_COUNT": count}
        ended = subprocess.run(["bash", str(tmp_path / "job.sh")], env=environment)
        assert ended.returncode == code
        assert find(stand_ins.calls, "lopd.main") == [["python3", "-m", "lopd.main", *ARGS]]
        assert len(find(stand_ins.calls, "scontrol", "requeue", "77")) == requeued


def test_slurm_that_refuses_the_job_is_one_line(stand_ins, tmp_path):
    stand_ins.plan([{"words": ["sbatch"], "code": 1}])
    done = stand_ins.run("slurm.sh", f"--logs={tmp_path}")
    assert done.returncode == 2 and "sbatch refused" in done.stderr


def test_gke_workload_restarts_and_its_command_works(stand_ins):
    assert stand_ins.run("gke.sh", *LAUNCHERS["gke.sh"], "--env=MINE=x y").returncode == 0
    (call,) = stand_ins.calls
    assert call[:3] == ["xpk", "workload", "create"]
    for flag in ("--cluster=c", "--tpu-type=v6e-16", "--workload=lopd", "--env=MINE=x y",
                 "--max-restarts=100", "--restart-on-exit-codes=75"):  # fmt: skip
        assert flag in call
    stand_ins.plan([])
    assert stand_ins.shell(command_in(call)).returncode == 0
    assert stand_ins.calls[-1] == ["python", "-m", "lopd.main", *ARGS]
    stand_ins.plan([{"words": ["xpk"], "code": 1}])
    assert stand_ins.run("gke.sh", "delete", "--cluster=c", args=None).returncode == 1
    assert stand_ins.calls[-1] == ["xpk", "workload", "delete", "--cluster=c", "--workload=lopd"]


def test_hostile_arguments_arrive_at_a_pod_as_they_were(stand_ins):
    assert stand_ins.run("gke.sh", *LAUNCHERS["gke.sh"], args=HOSTILE).returncode == 0
    command = command_in(stand_ins.calls[0])
    assert "\n" not in command
    for shell in ("sh", "dash", "bash"):
        if shutil.which(shell):
            stand_ins.plan([])
            done = stand_ins.shell(command, shell)
            assert done.returncode == 0, done.stderr
            assert stand_ins.calls[-1] == ["python", "-m", "lopd.main", *HOSTILE], shell


def test_hostile_arguments_arrive_at_slurms_tasks_as_they_were(stand_ins, tmp_path):
    stand_ins.script("sbatch", SBATCH)
    stand_ins.script("srun", SRUN)
    stand_ins.script("python3", STAND_IN.replace("call = [name,", "call = [os.environ['MINE'],"))
    options = [f"--env=MINE={HOSTILE[-6]}\n$(id)'", f"--logs={tmp_path}/a b'c"]
    assert stand_ins.run("slurm.sh", *options, args=HOSTILE).returncode == 0
    done = subprocess.run(["bash", str(tmp_path / "job.sh")], env=stand_ins.environment)
    assert done.returncode == 0
    assert stand_ins.calls == [[f"{HOSTILE[-6]}\n$(id)'", "-m", "lopd.main", *HOSTILE]]


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_hostile_arguments_arrive_at_tpu_workers_as_they_were(stand_ins, shell):
    stand_ins.plan([*node_is("READY"), not_running(), follow(0)])
    mine = "a PYTHON b\n$(id)'"
    assert stand_ins.run("tpu_pod.sh", *TPU, f"--env=MINE={mine}", args=HOSTILE).returncode == 0
    start, watch = (command_in(find(stand_ins.calls, w)[0]) for w in ("nohup", "tail -n"))
    for folder in ("lopd-venv/bin", "lopd-code"):
        (stand_ins.path / folder).mkdir(parents=True)
    stand_ins.script("lopd-venv/bin/python", recorded_python(stand_ins.path / "runs.jsonl", [0]))
    assert stand_ins.shell(start, shell).returncode == 0
    assert stand_ins.shell(watch).returncode == 0
    ((arguments, seen),) = map(json.loads, (stand_ins.path / "runs.jsonl").open())
    assert arguments == ["-m", "lopd.main", *HOSTILE] and seen["MINE"] == mine


def test_hostile_arguments_arrive_at_local_processes_as_they_were(stand_ins):
    assert stand_ins.run("local.sh", "--processes=2", args=HOSTILE).returncode == 0
    runs = find(stand_ins.calls, "lopd.main")
    assert runs == [["python3", "-m", "lopd.main", *HOSTILE]] * 2
    command = [str(LAUNCH / "local.sh"), "--processes=1", "--dry-run", "--", *HOSTILE]
    dry = subprocess.run(command, capture_output=True).stdout.decode()  # with its \r
    for shell in ("sh", "bash"):
        stand_ins.plan([])
        assert stand_ins.shell(dry, shell).returncode == 0
        assert stand_ins.calls == runs[:1]


def children(pid: int) -> list[int]:
    return [int(x) for x in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_local_run_in_two_processes_survives_a_signal_to_one(tmp_path):
    """SIGTERM to the second process: both stop at the same step, the launcher starts them again,
    and the metrics are those of a run of one process that nobody stopped."""
    changes = SMALL | BATCHES | {
        "teacher.steps": 40,
        "teacher.model.num_hidden_layers": 1,
        "mesh.fsdp": 2,
        "mesh.data": 2,
    }  # fmt: skip
    settings = [f"--config.{key}={value}" for key, value in changes.items()]
    config = [f"--config={REPOSITORY / 'configs/tiny.py'}", "--stages=teacher"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [
        str(LAUNCH / "local.sh"),
        "--processes=2",
        "--devices=2",
        f"--python={sys.executable}",
    ]
    log = (tmp_path / "log").open("w+")
    launcher = subprocess.Popen(
        [*command, "--", *config, f"--workdir={tmp_path / 'two'}", *settings],
        stdout=log, stderr=subprocess.STDOUT, env=environment,
    )  # fmt: skip
    metrics = tmp_path / "two" / "teacher" / "metrics.jsonl"
    while launcher.poll() is None and not (
        metrics.exists() and metrics.read_text().count("\n") > 5
    ):
        time.sleep(0.02)
    second = [
        pid
        for pid in children(launcher.pid)
        if b"JAX_PROCESS_ID=1" in pathlib.Path(f"/proc/{pid}/environ").read_bytes()
        and b"lopd.main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(second[0], signal.SIGTERM)
    code = launcher.wait()
    log.seek(0)
    said = log.read()
    assert code == 0, said
    assert said.count("lopd: stopped") == 2 and "starting again (1 of 100)" in said
    assert said.count("[1/1] teacher\n") == 1 and "[1/1] teacher: continued" in said

    alone = [sys.executable, "-m", "lopd.main", *config, f"--workdir={tmp_path / 'one'}", *settings]
    alone += ["--config.mesh.fsdp=1", "--config.mesh.data=1"]
    environment |= {"JAX_PLATFORMS": "cpu"}
    subprocess.run(alone, check=True, cwd=REPOSITORY, env=environment, capture_output=True)
    rows, expected = (
        [json.loads(x) for x in (tmp_path / run / "teacher/metrics.jsonl").read_text().splitlines()]
        for run in ("two", "one")
    )
    assert [row["step"] for row in rows] == list(range(1, 41))
    for row, other in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
