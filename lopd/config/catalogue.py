"""The stages of a run, in order: what each needs, samples, scores and trains, as plain data.

Pipeline, checks, evaluation, report, study and planner read this table and nothing else knows a
stage by name. What a stage does is in the module `lopd.stages.NAME`. To add one: an entry here,
its section in `lopd.config.settings`, its module.
"""

import dataclasses
from collections.abc import Callable

from lopd.config.settings import Settings

BASE = "base"
"""In evaluations, the student before any training; other models are named after their stage."""
TEACHER, STUDENT = "teacher", "student"
"""The two models of a run; sections of the settings hold their shapes and checkpoints."""


def refreshes(settings: Settings) -> bool:
    """Whether `opd` samples its prompts again on the way, and so needs a teacher."""
    return settings.opd.refresh_every is not None or settings.opd.refresh_below is not None


Of = Callable[[Settings], tuple[str, ...]]
"""Names that follow from the settings."""


def always(*names: str) -> Of:
    """These names, whatever the settings."""
    return lambda settings: names


_NONE = always()


def _if_sampled(*names: str) -> Of:
    return lambda settings: names if settings.sft_data.responses == "sampled" else ()


def _if_refreshed(*names: str) -> Of:
    return lambda settings: names if refreshes(settings) else ()


@dataclasses.dataclass(frozen=True)
class StageInfo:
    """One stage, as far as others need to know it."""

    name: str
    """Also that of its module in `lopd.stages` and of its artefact's directory."""
    does: str
    """A sentence for people."""
    title: str = ""
    """Name of its model in tables; empty if it trains none."""
    needs: Of = _NONE
    """The stages whose artefacts it reads."""
    reads_if_there: tuple[str, ...] = ()
    """Stages whose artefacts it reads if they have run before."""
    trains: str = ""
    """Whose weights it leaves, the teacher's or the student's; empty for none."""
    learns_from: str = ""
    """The section that says how long the responses are that it trains on."""
    samples: Of = _NONE
    """Who answers prompts in it: at most one."""
    sampling: str = ""
    """The section that says how; by default its own."""
    scores: Of = _NONE
    """Who scores what is sampled."""
    samples_each_step: bool = False
    """Whether each of its training steps samples what it trains on."""
    section: str = ""
    """Its section of the settings; by default that of its name."""
    splits: bool = False
    """Whether `--worker` can split it, because it samples into shards."""
    by_default: bool = True
    """Whether the method itself needs it."""
    instead: str = ""
    """The setting, by dotted key, that names what to use instead of running it."""

    @property
    def settings_section(self) -> str:
        """The name of its section of the settings."""
        return self.section or self.name

    @property
    def sampling_section(self) -> str:
        """The name of the section by which it samples."""
        return self.sampling or self.name


def _opd_needs(settings: Settings) -> tuple[str, ...]:
    needs = ("sft", "precompute", *_if_refreshed("teacher")(settings))
    return needs if settings.opd.refresh_below is None else (*needs, "heldout")


CATALOGUE = (
    StageInfo(
        "teacher",
        "tiny runs only: trains a teacher on worked answers",
        title="Teacher",
        trains=TEACHER,
        learns_from="sft_data",
        instead="teacher.checkpoint",
    ),
    StageInfo(
        "sft_data",
        "the teacher answers the SFT prompts",
        needs=_if_sampled("teacher"),
        samples=_if_sampled(TEACHER),
        splits=True,
    ),
    StageInfo(
        "sft",
        "fine-tunes the base student on the teacher's answers: π_ref",
        title="SFT",
        needs=always("sft_data"),
        trains=STUDENT,
        learns_from="sft_data",
        instead="sft.checkpoint",
    ),
    StageInfo(
        "precompute",
        "π_ref samples, teacher and π_ref score: the cache",
        needs=always("teacher", "sft"),
        samples=always(STUDENT),
        scores=always(TEACHER, STUDENT),
        splits=True,
        instead="opd.cache",
    ),
    StageInfo(
        "heldout",
        "fresh T = 1 responses of π_ref, for the drift panel",
        needs=always("teacher", "sft"),
        samples=always(STUDENT),
        scores=always(TEACHER, STUDENT),
        splits=True,
    ),
    StageInfo(
        "opd",
        "pulls log π_θ towards log π_T on the cache",
        title="OPD",
        needs=_opd_needs,
        reads_if_there=("heldout",),
        trains=STUDENT,
        learns_from="precompute",
        samples=_if_refreshed(STUDENT),
        sampling="precompute",
        scores=_if_refreshed(TEACHER, STUDENT),
    ),
    StageInfo(
        "online",
        "the same on fresh rollouts at every step, with a live teacher",
        title="Online OPD",
        needs=always("teacher", "sft"),
        reads_if_there=("heldout",),
        trains=STUDENT,
        learns_from="precompute",
        samples=always(STUDENT),
        sampling="precompute",
        scores=always(TEACHER),
        samples_each_step=True,
        section="opd",
        by_default=False,
    ),
    StageInfo(
        "control",
        "goes on with SFT instead of OPD",
        title="Control",
        needs=always("sft", "sft_data"),
        trains=STUDENT,
        learns_from="sft_data",
    ),
    StageInfo("export", "the student as a Hugging Face checkpoint", needs=always("opd")),
    StageInfo("eval", "grades every model"),
)
"""All stages, in the order in which they run."""

STAGES = tuple(info.name for info in CATALOGUE)
"""The names of all stages."""
DEFAULT_STAGES = tuple(info.name for info in CATALOGUE if info.by_default)
"""What the method itself needs."""


def stage_info(name: str) -> StageInfo:
    """The entry of a stage.

    Raises:
      KeyError: for another name.
    """
    return _BY_NAME[name]


_BY_NAME = {info.name: info for info in CATALOGUE}
