"""Shared by all commands: flags, mistakes as one line, exit codes, signals.

The commands are doors: `lopd.main`, `lopd.study`, `lopd.plan`, `lopd.cache`, `lopd.report`.
"""

import ast
import contextlib
import errno
import itertools
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from lopd import interrupts
from lopd.config.config_dict import read_settings
from lopd.config.settings import Settings
from lopd.errors import UserError
from lopd.machine import outputs, shutdown


class _PathParser(flags.ArgumentParser):
    """A path; a leading ~ is the home directory, which shells leave alone behind an =."""

    syntactic_help = "a path"

    def parse(self, argument: str) -> str:
        return os.path.expanduser(argument)


def path_argument(text: str) -> str:
    """A path on the command line of a command without absl's flags.

    Raises:
      UserError: if it is empty, which would be the current folder.
    """
    if not text.strip():
        raise UserError("a path is empty: give the name of a file or folder")
    return os.path.expanduser(text)


CONFIG = config_flags.DEFINE_config_file("config", None, "The settings file.", lock_config=True)
WORKDIR = flags.DEFINE(
    _PathParser(),
    "workdir",
    None,
    "Where artefacts go; runs/NAME by default, for a settings file NAME.py.",
    serializer=flags.ArgumentSerializer(),
)
"""Where artefacts go."""
STAGES = flags.DEFINE_list("stages", [], "Stages to run; those of the config by default.")
WORKER = flags.DEFINE_string("worker", "", "i/N: sample part i of N (from 0), to be merged.")


_EXIT_UNREAD = 128 + signal.SIGPIPE
"""Whoever read the answer has had enough; as a shell calls it."""


@contextlib.contextmanager
def door(answers: bool = False) -> Iterator[None]:
    """Around every command: streams that may go away, Ctrl-C in one line.

    Args:
      answers: whether the command is there for what it prints. It then ends when nobody can read
        it; others, which leave files, go on.
    """
    interrupts.end_at_once()
    try:
        with outputs.guarded(answers):
            yield
    except outputs.Gone as gone:
        if gone.by_reader:
            sys.exit(_EXIT_UNREAD)
        with outputs.guarded(answers=False):
            fail(str(gone))


def report_error(message: str) -> None:
    """One line on the standard error."""
    print(f"lopd: error: {message}", file=sys.stderr)


def fail(message: str) -> NoReturn:
    """Ends the program with one line."""
    report_error(message)
    sys.exit(shutdown.EXIT_ERROR)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """For commands that only read and write files: what a user can mend is one line."""
    try:
        yield
    except (UserError, OSError) as error:
        fail(str(error))


def _home(argument: str) -> str:
    """A --config=~/FILE with the home directory in it."""
    name, equals, value = argument.partition("=")
    if equals and name.lstrip("-") == "config":
        return f"{name}={os.path.expanduser(value)}"
    return argument


def _config_files(argv: list[str]) -> list[str]:
    """The settings files that a command line names."""
    named = [match[1] for a in argv if (match := re.fullmatch(r"--?config=(.*)", a, re.DOTALL))]
    return named + [b for a, b in itertools.pairwise(argv) if a in ("--config", "-config")]


def _path_of(name: str) -> str:
    """The file of a --config=FILE or --config=FILE:ARGUMENT."""
    return name if os.path.exists(name) else name.partition(":")[0]


def _check_config_file(name: str) -> None:
    """Refuses a --config that is no settings file before ml_collections runs it.

    Raises:
      UserError: naming the file and what is wrong with it.
    """
    where, path = f"--config={name}", _path_of(name)
    if not os.path.isfile(path):
        kind = "is a folder" if os.path.isdir(path) else "does not exist"
        kind = "is no file" if os.path.exists(path) and not os.path.isdir(path) else kind
        raise UserError(f"{where} {kind}: give a settings file, as configs/tiny.py")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        ast.parse(text)
    except SyntaxError as error:
        raise UserError(f"{where}: not Python, line {error.lineno} ({error.msg})") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{where}: not a text file ({error})") from error
    if not re.search(r"\bget_config\b", text):
        raise UserError(f"{where} has no get_config(), so it is no settings file")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _config_error(error: BaseException, names: list[str]) -> str | None:
    """What went wrong while a settings file ran, in one line; None if it was something else."""
    paths = {os.path.realpath(_path_of(name)): name for name in names}
    for cause in reversed([*_chain(error)]):
        frames = traceback.extract_tb(cause.__traceback__)
        lines = [(f.filename, f.lineno) for f in frames if os.path.realpath(f.filename) in paths]
        if lines:
            file, line = lines[-1]
            what = " ".join(f"{type(cause).__name__}: {cause}".split())[:500]
            return f"--config={paths[os.path.realpath(file)]}, line {line}: {what}"
    deepest = [*_chain(error)][-1]
    if names and ("parsing config file" in str(error) or "get_config" in str(deepest)):
        return f"--config={names[-1]}: {' '.join(str(deepest).split())}"
    return None


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing, with any mistake in a setting as one line; `--config.key=None` unsets one."""
    argv = [_home(argument) for argument in argv]
    names = _config_files(argv)
    with one_line_errors():
        for name in names:
            _check_config_file(name)
    last = dict(re.findall(r"^--?config\.(.+?)=(.*)$", "\n".join(argv), flags=re.MULTILINE))
    unset = [key for key, value in last.items() if value == "None"]
    logging.set_verbosity(logging.ERROR)  # of what is said here as an error, a warning comes first
    try:
        rest = flags.FLAGS([a for a in argv if not re.fullmatch(r"--?config\..+=None", a)])
        if CONFIG.present and not isinstance(CONFIG.value, ml_collections.ConfigDict):
            kind = type(CONFIG.value).__name__
            fail(f"--config={names[-1]}: get_config() gives {kind}, no settings (a ConfigDict)")
        for key in unset if CONFIG.value is not None else ():
            CONFIG.value.update_from_flattened_dict({key: None})
        return rest
    except (Exception, SystemExit) as error:  # a settings file may raise anything
        if said := _config_error(error, names):
            fail(said)
        _fail_of_flags(error, argv)


def _fail_of_flags(error: BaseException, argv: list[str]) -> NoReturn:
    """Ends the program with a line on a flag that cannot be; raises what is no mistake of one."""
    if isinstance(error, AttributeError | KeyError):
        # ml_collections' "'key'… Did you mean …?" says neither where the key was nor what it is.
        message = str(error.args[0])
        key = re.match(r"\W*(\w+)", message).group(1)
        given = [a.split("=")[0] for a in argv if key in re.split(r"[.=]", a)]
        nearest = re.search(r'mean "(\w+)"', message)
        hint = f"; did you mean {nearest.group(1)!r}?" if nearest else ""
        fail(f"{' '.join(given)}: there is no setting {key!r}{hint}")
    if isinstance(error, flags.Error | TypeError | ValueError | OSError):
        fail(" ".join(str(error).split()))
    raise error


def default_workdir(config: str) -> str:
    """Where the artefacts of a --config=FILE or FILE:ARGUMENT go if nobody says where."""
    name, _, argument = os.path.basename(config).partition(":")
    return os.path.join("runs", "-".join(filter(None, (name.removesuffix(".py"), argument))))


def settings_and_workdir(argv: list[str], example: str) -> Settings:
    """The settings of a command that works in a --workdir; quietens the libraries."""
    if len(argv) > 1:
        fail(f"unexpected argument {argv[1]!r}; settings are given as --config.key=value")
    if CONFIG.value is None:
        fail(f"--config=FILE is needed, as in {example}")
    if not WORKDIR.value:
        if WORKDIR.present:
            fail("--workdir is empty: give a directory, or leave it out for runs/NAME")
        config = config_flags.get_config_filename(flags.FLAGS["config"])
        flags.FLAGS["workdir"].value = default_workdir(config)
    return settings()


def settings() -> Settings:
    """The settings of --config, each within its domain; otherwise the program ends with a line."""
    quiet()
    with one_line_errors():
        return read_settings(CONFIG.value)


def quiet() -> None:
    """Leaves libraries their warnings only: Orbax reports every file at INFO."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)


def guarded(work: Callable[[], None]) -> None:
    """Sets the process up for a working directory, does the work, and ends it with its exit code.

    A mistake of the user's or a full disk is one line; signals are a request to stop.
    """
    # Imported here so that a mistake on the command line is reported at once.
    from lopd.machine import processes, setup
    from lopd.machine.storage import is_local

    setup.prepare(WORKDIR.value)
    try:
        processes.initialize()
        with shutdown.on_signals():
            work()
    except UserError as error:
        report_error(str(error))
        processes.leave(shutdown.EXIT_ERROR)
    except shutdown.Stopped:
        print("\nlopd: stopped; the same command continues from here", file=sys.stderr)
        sys.exit(shutdown.EXIT_STOPPED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            traceback.print_exc()
            processes.leave(1)
        # Buckets do not fill up; what goes to one, or comes from it, is on a disk on the way.
        where = WORKDIR.value if is_local(WORKDIR.value) else tempfile.gettempdir()
        report_error(
            f"no room left on the disk of {where} ({error}): free some and run the same command, "
            "it continues from what is finished"
        )
        processes.leave(shutdown.EXIT_ERROR)
    except Exception:
        traceback.print_exc()
        processes.leave(1)
