"""Intervals and the length model against scipy, which computes the same in another way."""

from types import SimpleNamespace

import numpy as np
import pytest

from purld.evaluation import winrate
from purld.evaluation.intervals import bca_interval, bootstrap_values, constant_interval, wilson_interval

optimize = pytest.importorskip("scipy.optimize", reason="scipy comes with the development tools")
stats = pytest.importorskip("scipy.stats")


def values(kind: str, n: int) -> np.ndarray:
    rng = np.random.default_rng(n)
    return {
        "symmetric": rng.normal(size=n),
        "skewed": rng.exponential(size=n),
        "few wins": (rng.random(n) < 0.08).astype(float),
        "ties": rng.choice([0.0, 0.25, 0.5, 1.0], size=n),
    }[kind]


@pytest.mark.parametrize("n", [15, 120])
@pytest.mark.parametrize("kind", ["symmetric", "skewed", "few wins", "ties"])
def test_bca_of_a_mean(kind, n):
    """On the same resamples; scipy finds the acceleration by a jackknife, which for a mean is exact."""
    x = values(kind, n)
    resampled = bootstrap_values(lambda index: x[index].mean(axis=1), n, seed=1)
    given = SimpleNamespace(bootstrap_distribution=resampled)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=0, method="BCa", bootstrap_result=given).confidence_interval
    np.testing.assert_allclose(bca_interval(x.mean(), resampled, x), (theirs.low, theirs.high), rtol=1e-9)


def pairs(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return whether a model wins, and the reference's length minus the model's, where longer answers win."""
    rng = np.random.default_rng(seed)
    delta = rng.normal(scale=80.0, size=n)
    return (rng.random(n) < 1 / (1 + np.exp(0.6 + 0.02 * delta))).astype(float), delta


def test_bca_of_the_length_controlled_rate():
    """The influence of a pair is a derivative here and a jackknife in scipy, so the ends agree to 0.002."""
    wins, delta = pairs(150, 3)
    resampled = bootstrap_values(lambda index: winrate._controlled_rates(wins[index], delta[index]), 150, seed=1)
    ours = bca_interval(winrate._controlled_rate(wins, delta), resampled, winrate._influence(wins, delta))
    theirs = stats.bootstrap(
        (wins, delta),
        lambda w, d: winrate._controlled_rate(np.asarray(w), np.asarray(d)),
        paired=True, vectorized=False, n_resamples=0, method="BCa",
        bootstrap_result=SimpleNamespace(bootstrap_distribution=resampled),
    ).confidence_interval  # fmt: skip
    np.testing.assert_allclose(ours, (theirs.low, theirs.high), atol=2e-3)


@pytest.mark.parametrize("seed", range(4))
def test_the_length_model_is_at_the_minimum(seed):
    wins, delta = pairs(60, seed)
    terms = np.tanh(delta / delta.std())

    def loss(parameters):
        logit = parameters[0] + parameters[1] * terms
        likelihoods = stats.logistic.logcdf(np.where(wins == 1, logit, -logit))
        return -likelihoods.mean() + winrate.RIDGE * parameters[1] ** 2

    best = optimize.minimize(loss, [0.0, 0.0], method="BFGS", options={"gtol": 1e-9}).x
    theta, phi, _ = winrate._fit(wins[None], delta[None])
    np.testing.assert_allclose([theta[0], phi[0]], best, atol=1e-6)
    rate = winrate.length_controlled_rate(wins, 100 + delta - delta.min(), np.full(60, 100 - delta.min()))
    np.testing.assert_allclose(rate, 1 / (1 + np.exp(-best[0])), atol=1e-6)


@pytest.mark.parametrize(("k", "n"), [(0, 7), (3, 7), (7, 7), (40, 200)])
def test_intervals_of_shares(k, n):
    wilson = stats.binomtest(k, n).proportion_ci(0.95, "wilson")
    np.testing.assert_allclose(wilson_interval(k / n, n), (wilson.low, wilson.high), atol=1e-12)
    exact = stats.binomtest(n, n).proportion_ci(0.95, "exact")  # all n of n
    np.testing.assert_allclose(constant_interval(1.0, n, (0.0, 1.0)), (exact.low, 1.0), atol=1e-12)
