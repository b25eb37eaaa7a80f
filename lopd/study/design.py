"""What a study consists of, and the settings that each of its runs has."""

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from lopd.config.catalogue import CATALOGUE, STAGES, stage_info
from lopd.config.settings import Settings
from lopd.config.values import changed
from lopd.errors import UserError


def path_to(model: str) -> tuple[str, ...]:
    """The stages that lead from π_ref to a model, in order; none for those before it."""
    info = stage_info(model)
    if not info.trains or model in _SHARED:
        return ()
    read = {*info.needs(Settings()), *info.reads_if_there} - {*_SHARED}
    return tuple(name for name in STAGES if name in read or name == model)


MODELS = tuple(info.name for info in CATALOGUE if info.trains)
"""What an arm may evaluate."""
_SHARED = ("teacher", "sft")
"""The models that arms have in common."""

_BEFORE = ("seed", "teacher", "student", "sft", "eval")
_AFTER = "student.lora."
"""What of these may differ nevertheless: adapters may begin after π_ref."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train a student, to be run with every seed.

    An arm starts at π_ref, which all arms with the same `sft_teacher` share: `overrides` say how it
    goes on from there, and so cannot touch the settings of what lies before.
    """

    name: str
    """In tables, figures and `--arms`."""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings by dotted key."""
    student: str = "opd"
    """The stage that trains what is evaluated, one of `MODELS`."""
    teacher: str = "plain"
    """The teacher that scores, by its name in the study."""
    sft_teacher: str = ""
    """The teacher that wrote the SFT data; by default the same."""

    @property
    def writer(self) -> str:
        """The teacher that wrote the SFT data."""
        return self.sft_teacher or self.teacher


@dataclasses.dataclass(frozen=True)
class Section:
    """One table of the results and its figure."""

    name: str
    """Of its figure's file, too."""
    title: str
    """Above it."""
    text: str = ""
    """What is shown, in a sentence or two."""
    arms: Sequence[str] = ()
    """Rows of accuracies."""
    pairs: Sequence[tuple[str, str]] = ()
    """(a, b): rows of paired differences a − b."""
    figure: str = "bars"
    """"bars" or "cost" of the arms, "grid" of four of them, or "pairs": the differences."""


@dataclasses.dataclass(frozen=True)
class Study:
    """A grid of arms × seeds.

    Teachers are trained once, with a seed of their own, and shared by all seeds: those vary
    prompts, the student's initial weights, responses and order. Intervals over seeds say nothing
    about other teachers.
    """

    base: Settings
    """What all arms start from."""
    seeds: Sequence[int]
    teachers: Mapping[str, Mapping[str, Any]]
    """Name → settings by dotted key."""
    arms: Sequence[Arm]
    sections: Sequence[Section]
    """In the order of the page."""
    teacher_seed: int = 0
    """What teachers are trained with."""

    def arm(self, name: str) -> Arm:
        """The arm with this name.

        Raises:
          UserError: if there is none.
        """
        found = {arm.name: arm for arm in self.arms}
        if name not in found:
            raise UserError(f"no arm is called {name!r}; there are {', '.join(found)}")
        return found[name]

    def teacher_config(self, name: str) -> Settings:
        """The settings that a teacher is made with.

        Raises:
          UserError: for an unknown teacher, or a setting that there is not.
        """
        if name not in self.teachers:
            raise UserError(f"no teacher is called {name!r}; there are {', '.join(self.teachers)}")
        changes = {**self.teachers[name], "seed": self.teacher_seed}
        return _changed(self.base, changes, f"teacher {name!r}")

    def start_config(self, arm: Arm, seed: int) -> Settings:
        """The settings of an arm up to π_ref."""
        return _changed(self.teacher_config(arm.writer), {"seed": seed}, f"arm {arm.name!r}")

    def after_config(self, arm: Arm, seed: int) -> Settings:
        """The settings of an arm from π_ref on.

        Raises:
          UserError: for a setting that there is not, or one that an arm may not have.
        """
        what = f"arm {arm.name!r}"
        for key in arm.overrides:
            if key.partition(".")[0] in _BEFORE and not key.startswith(_AFTER):
                raise UserError(
                    f"{what}: {key} is settled before the arms part; change it in the base "
                    "settings, or give the arm a teacher with it"
                )
        config = _changed(self.teacher_config(arm.teacher), arm.overrides, what)
        inconsistent = arm.writer != arm.teacher
        return _changed(
            config,
            {
                "seed": seed,
                "eval.models": (arm.student,),
                "precompute.allow_inconsistent_teacher": inconsistent,
            },
            what,
        )

    def check(self, names: Sequence[str] = ()) -> list[Arm]:
        """The arms that are named (all, if none is), each with settings that can be made.

        Raises:
          UserError: one line that says what is wrong with the study or the names.
        """
        all_names = [arm.name for arm in self.arms]
        for name in all_names:
            if all_names.count(name) > 1:
                raise UserError(f"two arms are called {name!r}")
        for section in self.sections:
            for name in (*section.arms, *(name for pair in section.pairs for name in pair)):
                self.arm(name)
        arms = [self.arm(name) for name in names] or list(self.arms)
        for arm in arms:
            if arm.student not in MODELS:
                raise UserError(
                    f"arm {arm.name!r}: student={arm.student!r} must be one of {', '.join(MODELS)}"
                )
            self.start_config(arm, self.seeds[0])
            self.after_config(arm, self.seeds[0])
        return arms


def _changed(settings: Settings, changes: Mapping[str, Any], what: str) -> Settings:
    """`changed`, whose errors name `what` the changes belong to."""
    try:
        return changed(settings, changes)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def load(path: str, base: Settings) -> Study:
    """The study of a file: its `get_study(base)`, with settings that may have been changed.

    Raises:
      UserError: if the file defines no study.
    """
    spec = importlib.util.spec_from_file_location("lopd_study_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_study"):
        raise UserError(f"--config={path} has no get_study(config), so it is no study")
    return module.get_study(base)
