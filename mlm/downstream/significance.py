"""Is one model better than another, or was it chance? Paired differences over seeds and test texts.

Scores vary with the seed (new head, order, dropout) and with the texts that happen to be tested on, and so must an
interval for their difference: Bouthillier et al., Accounting for Variance in Machine Learning Benchmarks (arXiv
2103.03098); Dror et al., The Hitchhiker's Guide to Testing Statistical Significance in NLP (doi 10.18653/v1/P18-1128).
"""

from itertools import product
from typing import NamedTuple

import numpy as np
from scipy import stats

from mlm.downstream.metrics import Metric

LEVEL = 0.05  # of all tests together
POWER = 0.8  # with which the smallest gain shows
REPLICATES = 1000  # of the bootstrap
ALL_FLIPS = 12  # seeds, up to which every combination of signs is tried
RANDOM_FLIPS = 4096
DRAWS = 400  # experiments that the detectable gain is found with


class Gain(NamedTuple):
    """How much better a model is than the first, as a share (0.01 is one point)."""

    mean: float
    low: float  # of the interval
    high: float
    p: float
    detectable: float  # the true gain that would show in four of five such comparisons; infinite with too few seeds

    @property
    def verdict(self) -> str:
        """better, worse or cannot tell: whether chance is ruled out by both the interval and the test of signs."""
        if self.p <= LEVEL and (self.low > 0 or self.high < 0):
            return "better" if self.low > 0 else "worse"
        return "cannot tell"


class Spread(NamedTuple):
    """Where a difference's variance comes from, as variances of its mean over seeds and texts."""

    seeds: float
    texts: float
    residual: float  # of a seed on a text
    number_of_seeds: int
    number_of_texts: int

    def standard_error(self, between_seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mean's standard error and its degrees of freedom (Satterthwaite, doi 10.2307/3002019).

        between_seeds: the variance of the seeds' differences over their number, of any shape; it holds the residual,
        as the variance between texts does, which counts once.
        """
        of_texts = self.texts + self.residual
        variance = np.maximum(between_seeds - self.residual, 0) + of_texts
        uncertainty = between_seeds**2 / max(1, self.number_of_seeds - 1) + of_texts**2 / max(
            1, self.number_of_texts - 1
        )
        return np.sqrt(variance), variance**2 / uncertainty


def compare(counts: np.ndarray, metric: Metric, seed: int = 0) -> list[Gain]:
    """The gain of each model but the first.

    counts: (models, seeds, texts, 3, classes), as `count_answers` gives them. Every model has the same seeds and texts.
    The interval covers the mean over seeds and texts: Student's t about the mean difference, whose variance is that
    between seeds and, by a bootstrap, that between texts. (A bootstrap of so few seeds by itself is too narrow.) All
    intervals together hold at 95%, as they share the level (Bonferroni). The p-value is that of flipping the signs of
    the seeds' differences, of each model by itself: corrected too, it would need more seeds with every model. What is
    found holds for these training texts.
    """
    models, seeds, texts, *_ = counts.shape
    if models == 1:
        return []
    scores = metric(counts.sum(2, dtype=np.float64))  # (models, seeds)
    differences = scores[1:] - scores[:1]  # (compared, seeds)
    resampled = _bootstrap(counts, metric, np.random.default_rng(seed))  # (replicates, models, seeds)
    resampled = resampled[:, 1:] - resampled[:, :1]
    level = LEVEL / (models - 1)
    gains = []
    for of_model, replicas in zip(differences, resampled.swapaxes(0, 1), strict=True):
        spread = _find_spread(of_model, replicas, texts)
        variance = np.array(of_model.var(ddof=1) / seeds if seeds > 1 else 0.0)
        error, freedom = spread.standard_error(variance)
        half = float(stats.t.ppf(1 - level / 2, freedom) * error)
        mean = float(of_model.mean())
        low, high = max(-1.0, mean - half), min(1.0, mean + half)
        gains.append(Gain(mean, low, high, float(flip_signs(of_model)), detectable_gain(spread, level)))
    return gains


def _bootstrap(counts: np.ndarray, metric: Metric, draw: np.random.Generator) -> np.ndarray:
    """Scores (replicates, models, seeds) on texts drawn with replacement, the same for all models and seeds."""
    models, seeds, texts, *rest = counts.shape
    flat = counts.swapaxes(0, 2).reshape(texts, -1)  # (texts, seeds * models * 3 * classes)
    shape = (-1, seeds, models, *rest)
    scores = []
    for _ in range(0, REPLICATES, 50):  # so many at once that memory stays small
        weights = draw.multinomial(texts, np.full(texts, 1 / texts), size=50).astype(np.float32)
        scores.append(metric((weights @ flat).reshape(shape)))
    return np.concatenate(scores).swapaxes(1, 2)


def _find_spread(differences: np.ndarray, replicas: np.ndarray, texts: int) -> Spread:
    """From the differences (seeds,) and their bootstrap replicas (replicates, seeds).

    The replicas of one seed vary with texts and residual, those of the mean with texts and a part of the residual.
    """
    seeds = len(differences)
    # A bootstrap draws from n texts as from a population, and sees no spread where all agree: of a text more it knows
    # nothing, so one text's weight is added.
    of_mean, of_one = (variance * texts / max(1, texts - 1) + texts**-2 for variance in _variances(replicas))
    residual = max(0.0, (of_one - of_mean) / (seeds - 1)) if seeds > 1 else 0.0
    between_seeds = differences.var(ddof=1) / seeds if seeds > 1 else 0.0
    return Spread(max(0.0, between_seeds - residual), max(0.0, of_mean - residual), residual, seeds, texts)


def _variances(replicas: np.ndarray) -> tuple[float, float]:
    """Of the seeds' mean, and of one seed in the mean."""
    return float(replicas.mean(1).var()), float(replicas.var(0).mean())


# ------------------------------------------------------------------------------------------------------ signs flipped


def flip_signs(differences: np.ndarray) -> np.ndarray:
    """Two-sided p-values (...) for differences (..., seeds): how often chance signs give as large a mean.

    With n seeds the least there can be is 2 / 2**n.
    """
    flipped = np.abs(differences @ _signs(differences.shape[-1]).T)  # (..., flips)
    return (flipped >= np.abs(differences.sum(-1, keepdims=True)) - 1e-9).mean(-1)


def _signs(seeds: int) -> np.ndarray:
    if seeds <= ALL_FLIPS:
        return np.array(list(product((1.0, -1.0), repeat=seeds)))
    flips = np.random.default_rng(0).choice((1.0, -1.0), (RANDOM_FLIPS, seeds))
    flips[0] = 1.0  # what was observed is one of the possibilities
    return flips


# ----------------------------------------------------------------------------------------------- what could be found


def detectable_gain(spread: Spread, level: float) -> float:
    """The true gain that is called better in a share POWER of experiments, drawn with this spread."""
    seeds = spread.number_of_seeds
    if 2 / 2**seeds > LEVEL:
        return np.inf
    draw = np.random.default_rng(0)
    of_texts = draw.normal(0, spread.texts**0.5, (DRAWS, 1))
    of_seeds = draw.normal(0, ((spread.seeds + spread.residual) * seeds) ** 0.5, (DRAWS, seeds))
    chance = of_texts + of_seeds  # (draws, seeds) differences without a gain
    error, freedom = spread.standard_error(chance.var(1, ddof=1) / seeds)
    half = stats.t.ppf(1 - level / 2, freedom) * error  # (draws,)

    def power(gain: float) -> float:
        differences = chance + gain
        return float(((differences.mean(1) > half) & (flip_signs(differences) <= LEVEL)).mean())

    low, high = 0.0, 20 * float(error.mean())
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return min(high, 1.0)
