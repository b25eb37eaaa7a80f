"""Overlays on a recipe: what `--config=FILE.py:NAME` puts over the settings of FILE.py."""

import ml_collections


def _small(config: ml_collections.ConfigDict) -> None:
    """A few prompts, short responses, a few steps; models, data and memory as they are."""
    for section in (config.sft_data, config.precompute):
        section.update(prompts=64, samples=1, response_length=128)
    config.heldout.update(prompts=16, response_length=128)
    config.eval.update(prompts=16, samples=1, response_length=128)
    for recipe in (config.sft, config.opd, config.control):
        recipe.update(steps=8, batch_size=16, warmup_steps=2)
    config.runtime.checkpoint_every = 4


OVERLAYS = {"small": _small}
"""By name: what each changes."""


def overlaid(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    """The settings with the overlay of that name over them; as they are if it is empty.

    Raises:
      ValueError: if there is no such overlay.
    """
    if name and name not in OVERLAYS:
        raise ValueError(f"there is no overlay {name!r}; there is {', '.join(OVERLAYS)}")
    if name:
        OVERLAYS[name](config)
    return config
