"""From the settings of `opd` to its objective: the loss, what batches carry, and which tokens."""

import numpy as np

from lopd.config.settings import OpdSettings
from lopd.data import selection
from lopd.data.packing import TokenField
from lopd.data.tokenizers import Tokenizer
from lopd.errors import UserError
from lopd.objectives import sampled, token_weights
from lopd.objectives.divergences import DIVERGENCES, top_k_divergence


def needs_top_k(recipe: OpdSettings) -> bool:
    """Whether the objective compares distributions, and so needs the teacher's top-K."""
    return recipe.objective in DIVERGENCES


def make_objective(recipe: OpdSettings) -> sampled.Objective:
    """The objective that the settings ask for, with the diagnostics of the drift panel."""
    name, tau = recipe.objective, recipe.tau
    if name == "log_ratio":
        towards = "teacher_logprobs" if recipe.residual_folds is None else "target_logprobs"
        objective = sampled.lightning_opd(tau, recipe.extrapolation, towards)
    else:
        if needs_top_k(recipe):
            loss = top_k_divergence(name)
        elif name == "fixed_advantage":
            loss = sampled.fixed_advantage(recipe.fixed_advantage)
        else:
            loss = sampled.rollout_cross_entropy
        objective = sampled.with_teacher_diagnostics(loss, tau)
    if recipe.importance_cap is not None:
        objective = token_weights.truncated_importance(objective, recipe.importance_cap)
    if recipe.entropy_fraction < 1:
        objective = token_weights.train_highest_entropy(objective, recipe.entropy_fraction)
    return objective


def token_fields(
    recipe: OpdSettings, stored_top_k: int, where: str = "the cache"
) -> tuple[str | TokenField, ...]:
    """The fields of a record that the objective's batches carry.

    Args:
      recipe: the section `opd`.
      stored_top_k: how many of the teacher's most likely tokens the records hold.
      where: the records, for the message.

    Raises:
      UserError: if the objective needs more of them.
    """
    fields = ("teacher_logprobs", "ref_logprobs")
    if recipe.residual_folds is not None:
        fields += ("target_logprobs",)
    if not needs_top_k(recipe):
        return fields
    needed = recipe.top_k or 1
    if stored_top_k < needed:
        raise UserError(
            f"opd.objective={recipe.objective!r} with opd.top_k={recipe.top_k} needs the teacher's "
            f"top-K, and {where} holds K={stored_top_k}: make it with "
            f"precompute.teacher_top_k={needed} or more"
        )
    width = recipe.top_k or stored_top_k
    return (
        *fields,
        TokenField("teacher_topk_ids", width, np.int32),
        TokenField("teacher_topk_logprobs", width, np.float32),
    )


def token_selection(recipe: OpdSettings, tokenizer: Tokenizer) -> selection.TokenSelection:
    """The tokens that are trained on.

    Raises:
      UserError: if a masked token is not one of the tokenizer's.
    """
    known = {token: i for i, token in enumerate(tokenizer.tokens) if token}
    known |= {i: i for i in range(tokenizer.vocab_size)}
    for token in recipe.masked_tokens:
        if token not in known:
            raise UserError(f"opd.masked_tokens: {token!r} is no token of the tokenizer, nor an id")
    masked = tuple(sorted({known[token] for token in recipe.masked_tokens}))
    return selection.TokenSelection(recipe.position_fraction, recipe.entropy_fraction, masked)


def batch_contents(
    recipe: OpdSettings, tokenizer: Tokenizer, stored_top_k: int, where: str
) -> dict:
    """What a batch carries of each record, and of which tokens, for `training.make_batches`.

    Raises:
      UserError: if the objective needs more of the teacher's top-K than is stored, or a masked
        token is unknown.
    """
    return {
        "token_fields": token_fields(recipe, stored_top_k, where),
        "selection": token_selection(recipe, tokenizer),
    }


def check_objective(recipe: OpdSettings) -> None:
    """Refuses settings of an objective that do not go together.

    Raises:
      UserError: one line that names the setting, its value and what it must be.
    """
    is_method = recipe.objective == "log_ratio"
    unless_method = "unless opd.objective=log_ratio"
    rules = (
        ("extrapolation", is_method or recipe.extrapolation == 1, f"be 1 {unless_method}"),
        (
            "residual_folds",
            is_method or recipe.residual_folds is None,
            f"be None {unless_method}",
        ),
        (
            "importance_cap",
            recipe.importance_cap is None or not needs_top_k(recipe),
            "be None with a divergence, which does not depend on the token that was sampled",
        ),
    )
    for key, holds, must in rules:
        if not holds:
            raise UserError(f"opd.{key}={getattr(recipe, key)!r} must {must}")
