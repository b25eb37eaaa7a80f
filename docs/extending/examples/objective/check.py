"""The new divergence: value, bound and gradient, and that the settings find it."""

import jax
import numpy as np

from lopd.config.settings import OpdSettings
from lopd.objectives.divergences import skewed_kl
from lopd.stages.objective import check_objective, make_objective, needs_top_k

rng = np.random.default_rng(0)
p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
wanted = np.sum(p * np.log(p / (0.1 * p + 0.9 * q)))
np.testing.assert_allclose(skewed_kl(np.log(p), np.log(q)), wanted, rtol=1e-5)
assert skewed_kl(np.log(p), np.full(6, -80.0)) <= -np.log(0.1) + 1e-6

logits = np.log(p)
at_teacher = jax.grad(lambda x: skewed_kl(np.log(p), jax.nn.log_softmax(x)))(logits)
np.testing.assert_allclose(at_teacher, 0, atol=1e-6)

recipe = OpdSettings(objective="skewed_kl")
check_objective(recipe)
assert needs_top_k(recipe)
assert callable(make_objective(recipe))
