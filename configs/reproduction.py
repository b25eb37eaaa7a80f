"""The paper's claims at small scale, with five seeds: column addition, two CPU cores.

Command::

    python -m lopd.study --config=configs/reproduction.py --workdir=runs/reproduction --processes=2

A study runs every arm with every seed, makes what arms have in common once, continues where it was
stopped, and writes `results.json`, `results.md`, figures and `report.html`. To add an arm, add a
line to `_arms` and its name to a section. Overrides of the base settings apply to all arms, on any
device: `--config.precompute.prompts=20000 --config.opd.steps=625 --config.control.steps=625` makes
the whole study five times larger, with as many passes over its caches. The divergences' whole
vocabulary is for small ones.
"""

import importlib.util
import pathlib

from lopd.study import Arm, Section, Study

SEEDS = (21, 22, 23, 24, 25)


def get_config():
    """The base settings: those of the tiny run, with a shorter OPD on fewer prompts.

    With fewer steps the rate has to fall in the end: tuned on seeds 1 and 2 and the `dev` split.
    """
    path = pathlib.Path(__file__).with_name("tiny.py")
    spec = importlib.util.spec_from_file_location("tiny", path)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    config = tiny.get_config()
    config.stages = ()
    config.precompute.prompts = 3840  # two passes
    for stage in (config.opd, config.control):
        stage.update(
            steps=120, batch_size=64, learning_rate=1e-3, schedule="cosine", warmup_steps=10
        )
    config.eval.prompts = 500
    config.metrics.tensorboard = False
    config.runtime.update(checkpoint_every=10_000, drift_every=10_000)
    return config


def _arms(base):
    """Every arm in a line. "Scale" stands for what the base settings, which may change, say."""
    opd, prompts, steps = base.opd, base.precompute.prompts, base.opd.steps
    fresh = base.sft_data.prompts + prompts
    arms = [
        Arm("teacher", student="teacher"),
        Arm("teacher_a", student="teacher", teacher="a"),
        Arm("teacher_b", student="teacher", teacher="b"),
        Arm("sft", student="sft"),
        Arm("sft_a", student="sft", teacher="a"),
        Arm("sft_b", student="sft", teacher="b"),
        Arm("lightning"),
        Arm("online", student="online"),
        Arm("control", student="control"),
        Arm("sft_fresh", {"sft_data.prompts": fresh}, student="control"),
    ]
    # Teacher consistency: the first letter wrote the SFT data, the second scores.
    for wrote, teacher in ("aa", "ab", "ba", "bb"):
        name, who = wrote + teacher, {"teacher": teacher, "sft_teacher": wrote}
        arms += [Arm(f"lightning_{name}", **who), Arm(f"online_{name}", student="online", **who)]
        if wrote != teacher:
            arms += [
                Arm(f"lightning2_{name}", {"opd.residual_folds": 5, "opd.tau": 0.2}, **who),
                Arm(f"lightning_tau02_{name}", {"opd.tau": 0.2}, **who),
            ]
    # The map of the gap between offline and online: what differs from the core, one at a time.
    for name, changes, teacher in (
        ("sharp", {}, "sharp"),
        ("hot", {"precompute.temperature": 1.0}, "plain"),
        ("tau10", {"opd.tau": 10.0}, "plain"),
        ("sharp_tau10", {"opd.tau": 10.0}, "sharp"),
        ("lr3", {"opd.learning_rate": 3 * opd.learning_rate}, "plain"),
        ("long", {"opd.steps": 2 * steps}, "plain"),
        ("few", {"precompute.prompts": prompts // 4}, "plain"),
    ):
        arms += [
            Arm(f"lightning_{name}", changes, teacher=teacher),
            Arm(f"online_{name}", changes, teacher=teacher, student="online"),
        ]
    # Ablations; passes over the cache are of the same number of steps, and eight are `few`.
    arms += [
        Arm("passes_1", {"precompute.prompts": 2 * prompts}),
        Arm("passes_4", {"opd.records": prompts // 2}),
        Arm("samples_4", {"precompute.prompts": prompts // 4, "precompute.samples": 4}),
        Arm("half_cap", {"precompute.response_length": base.precompute.response_length // 2}),
        Arm("cool", {"precompute.temperature": 0.4}),
        Arm("tau01", {"opd.tau": 0.1}),
        Arm("refresh", {"opd.refresh_every": steps // 4}),
        Arm(
            "few_refresh",
            {"precompute.prompts": prompts // 4, "opd.refresh_every": steps // 4},
        ),
        Arm("extrapolated", {"opd.extrapolation": 1.25}),
        Arm("capped", {"opd.importance_cap": 1.0}),
        Arm("fixed", {"opd.objective": "fixed_advantage"}),
        Arm("sft_rollouts", {"opd.objective": "cross_entropy"}),
    ]
    whole = base.teacher.model["vocab_size"]
    for name, objective, top_k in (
        *((f"forward_kl_{k}", "forward_kl", k) for k in (1, 4, 8, whole)),
        ("reverse_kl_4", "reverse_kl", 4),
        ("reverse_kl", "reverse_kl", whole),
        ("jensen_shannon", "jensen_shannon", whole),
    ):
        changes = {"precompute.teacher_top_k": whole, "opd.objective": objective}
        arms.append(Arm(name, {**changes, "opd.top_k": top_k}))
    return arms


def _sections(base):
    """The tables and figures, in the order of the page."""
    gap = ("sharp", "hot", "tau10", "sharp_tau10", "lr3", "long", "few")
    whole = base.teacher.model["vocab_size"]
    passes = base.opd.steps * base.opd.batch_size / base.precompute.prompts
    return [
        Section(
            "teachers",
            "The teachers and the students they start",
            "The plain teacher writes every column as 5+4+1=10. A writes one column of four the "
            "other way round, 1+4+5=10, and B three. Only the grid of teachers uses these two, "
            "with 600 SFT prompts and not 295. Each taught SFT by its own answers.",
            arms=("teacher", "teacher_a", "teacher_b", "sft", "sft_a", "sft_b"),
            pairs=(("teacher_a", "teacher_b"), ("sft_a", "sft_b")),
        ),
        Section(
            "core",
            "Lightning OPD, online OPD and controls",
            "The control takes as many further SFT steps as OPD takes; sft_fresh does so on as "
            "many fresh teacher samples as there are rollouts.",
            arms=("sft", "control", "sft_fresh", "lightning", "online"),
            pairs=(
                *(("lightning", x) for x in ("sft", "control", "sft_fresh", "online")),
                ("online", "sft"),
            ),
        ),
        Section(
            "consistency_offline",
            "Teacher consistency, Lightning OPD",
            "Rows: who wrote the SFT data; columns: who scores.",
            **_grid("lightning"),
        ),
        Section(
            "consistency_online",
            "Teacher consistency, online OPD",
            "Rows: who wrote the SFT data; columns: who scores.",
            **_grid("online"),
        ),
        Section(
            "residual",
            "Lightning OPD 2.0 where the teachers differ",
            "The residualised advantage, with τ = 0.2, against the plain one with τ = 0.2 and 1.",
            arms=tuple(
                f"{arm}_{pair}"
                for pair in ("ab", "ba")
                for arm in ("lightning", "lightning_tau02", "lightning2")
            ),
            pairs=tuple(
                (f"lightning2_{pair}", f"{arm}_{pair}")
                for pair in ("ab", "ba")
                for arm in ("lightning_tau02", "lightning")
            ),
        ),
        Section(
            "gap",
            "Where the offline arm lags the online one",
            "Lightning OPD − online OPD, for the core settings and with one thing changed.",
            arms=tuple(f"{x}_{y}" for y in gap for x in ("lightning", "online")),
            pairs=(
                ("lightning", "online"),
                *((f"lightning_{x}", f"online_{x}") for x in gap),
            ),
            figure="pairs",
        ),
        Section(
            "ablations",
            "Ablations of the cache and the recipe",
            f"Each against the core's Lightning OPD ({passes:.3g} passes over the cache, 1 rollout "
            f"per prompt, T = {base.precompute.temperature}, τ = {base.opd.tau}). "
            f"{4 * passes:.3g} passes are lightning_few.",
            **_against(
                "lightning",
                "passes_1", "passes_4", "lightning_few", "samples_4", "half_cap", "cool",
                "lightning_hot", "tau01", "lightning_tau10", "refresh", "few_refresh",
                "extrapolated", "capped",
            ),
        ),
        Section(
            "objectives",
            "Objectives over one cache",
            "The teacher's top K of the forward KL; reverse KL and Jensen–Shannon with K = V.",
            **_against(
                "lightning",
                *(f"forward_kl_{k}" for k in (1, 4, 8, whole)),
                "reverse_kl_4", "reverse_kl", "jensen_shannon", "fixed", "sft_rollouts",
            ),
        ),
        Section(
            "cost",
            "What an arm costs after SFT",
            "Sampling, scoring and training of as many updates.",
            arms=("lightning", "online"),
            figure="cost",
        ),
    ]  # fmt: skip


def _grid(arm):
    """Rows of a section on the four pairs of teachers."""
    aa, ab, ba, bb = (f"{arm}_{pair}" for pair in ("aa", "ab", "ba", "bb"))
    pairs = ((aa, ab), (bb, ba), (aa, ba), (bb, ab))
    return {"arms": (aa, ab, ba, bb), "pairs": pairs, "figure": "grid"}


def _against(reference, *arms):
    """Rows of a section that compares arms with one."""
    return {"arms": (reference, *arms), "pairs": tuple((arm, reference) for arm in arms),
            "figure": "pairs"}  # fmt: skip


def get_study(base):
    """The study, with base settings that may have been changed."""
    return Study(
        base=base,
        seeds=SEEDS,
        teacher_seed=20,
        teachers={
            "plain": {},
            "sharp": {"teacher.label_smoothing": 0.0},
            # A mixture takes more examples to learn.
            "a": {"teacher.swapped": 0.25, "sft_data.prompts": 600},
            "b": {"teacher.swapped": 0.75, "sft_data.prompts": 600},
        },
        arms=_arms(base),
        sections=_sections(base),
    )
