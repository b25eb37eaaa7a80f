"""What the settings of `opd` choose: the objective, what its batches carry, and which tokens."""

import ml_collections
import numpy as np

from lopd.data import selection
from lopd.data.packing import TokenField
from lopd.data.tokenizers import Tokenizer
from lopd.errors import UserError
from lopd.objectives import sampled, token_weights
from lopd.objectives.divergences import DIVERGENCES, top_k_divergence

OBJECTIVES = ("log_ratio", *DIVERGENCES, "fixed_advantage", "cross_entropy")


def needs_top_k(recipe: ml_collections.ConfigDict) -> bool:
    """Whether the objective compares distributions, and so needs the teacher's top-K."""
    return recipe.objective in DIVERGENCES


def make_objective(recipe: ml_collections.ConfigDict) -> sampled.Objective:
    """The objective that a section like `opd` asks for, with the diagnostics of the drift panel."""
    name, tau = recipe.objective, recipe.tau
    if name == "log_ratio":
        towards = "target_logprobs" if recipe.residual_folds else "teacher_logprobs"
        objective = sampled.lightning_opd(tau, recipe.extrapolation, towards)
    else:
        if needs_top_k(recipe):
            loss = top_k_divergence(name)
        elif name == "fixed_advantage":
            loss = sampled.fixed_advantage(recipe.fixed_advantage)
        else:
            loss = sampled.rollout_cross_entropy
        objective = sampled.with_teacher_diagnostics(loss, tau)
    if recipe.importance_cap:
        objective = token_weights.truncated_importance(objective, recipe.importance_cap)
    if recipe.entropy_fraction < 1:
        objective = token_weights.train_highest_entropy(objective, recipe.entropy_fraction)
    return objective


def token_fields(
    recipe: ml_collections.ConfigDict, stored_top_k: int, where: str = "the cache"
) -> tuple[str | TokenField, ...]:
    """The fields of a record that the objective's batches carry.

    Args:
      stored_top_k: how many of the teacher's most likely tokens the records hold.
      where: the records, for the message.

    Raises:
      UserError: if the objective needs more of them.
    """
    fields = ("teacher_logprobs", "ref_logprobs")
    if recipe.residual_folds:
        fields += ("target_logprobs",)
    if not needs_top_k(recipe):
        return fields
    needed = max(recipe.top_k, 1)
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


def token_selection(
    recipe: ml_collections.ConfigDict, tokenizer: Tokenizer
) -> selection.TokenSelection:
    """The tokens that a section like `opd` trains on.

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


def check_settings(recipe: ml_collections.ConfigDict) -> None:
    """Checks what can be known of the objective's settings alone.

    Raises:
      UserError: one line that names the setting, its value and what it must be.
    """
    is_method = recipe.objective == "log_ratio"
    rules = (
        ("objective", recipe.objective in OBJECTIVES, f"be one of {', '.join(OBJECTIVES)}"),
        ("tau", recipe.tau > 0, "be positive"),
        ("extrapolation", is_method or recipe.extrapolation == 1,
         "be 1 unless opd.objective=log_ratio"),
        ("fixed_advantage", recipe.fixed_advantage < 0, "be negative"),
        ("residual_folds", recipe.residual_folds == 0 or recipe.residual_folds > 1,
         "be 0 (off) or at least 2"),
        ("residual_folds", is_method or not recipe.residual_folds,
         "be 0 unless opd.objective=log_ratio"),
        ("importance_cap", not (recipe.importance_cap and needs_top_k(recipe)),
         "be 0 with a divergence, which does not depend on the token that was sampled"),
        ("position_fraction", 0 < recipe.position_fraction <= 1, "lie in (0, 1]"),
        ("entropy_fraction", 0 < recipe.entropy_fraction <= 1, "lie in (0, 1]"),
        ("masked_tokens", all(isinstance(x, str | int) for x in recipe.masked_tokens),
         "hold tokens or their ids"),
        *((key, recipe[key] >= 0, "not be negative") for key in
          ("top_k", "importance_cap", "records")),
    )  # fmt: skip
    for key, holds, must in rules:
        if not holds:
            raise UserError(f"opd.{key}={recipe[key]!r} must {must}")
