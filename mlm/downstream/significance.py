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

ALPHA = 0.05  # significance level; the intervals of all models share it
POWER = 0.8  # with which the minimum detectable effect is found
BOOTSTRAP_REPLICATES = 1000
MOST_SEEDS_WITH_ALL_SIGNS = 12  # up to which every combination of signs is tried
RANDOM_SIGNS = 4096  # combinations, beyond that
SIMULATED_EXPERIMENTS = 400  # that the minimum detectable effect is found with


class Difference(NamedTuple):
    """How much better a model scores than the first, as a share (0.01 is one point)."""

    mean: float
    low: float  # of the 95% interval
    high: float
    p: float  # of the sign-flip permutation test
    minimum_detectable_effect: float  # true difference that is found with probability POWER; infinite with few seeds

    @property
    def verdict(self) -> str:
        """better, worse or cannot tell: whether both the interval and the permutation test rule chance out."""
        if self.p <= ALPHA and (self.low > 0 or self.high < 0):
            return "better" if self.low > 0 else "worse"
        return "cannot tell"

    @property
    def sentence(self) -> str:
        """The verdict with its figures in points."""
        mean, low, high, _, detectable = (100 * value for value in self)
        if self.verdict == "better":
            return f"better by {mean:.1f} ({low:.1f} to {high:.1f})"
        if self.verdict == "worse":
            return f"worse by {-mean:.1f} ({-high:.1f} to {-low:.1f})"
        if not np.isfinite(detectable):
            return "cannot tell: with fewer than 6 seeds no difference can be told from chance"
        if low > 0 or high < 0:
            return f"cannot tell: {mean:+.1f} in the mean, but the seeds do not agree; more --num_seeds may tell"
        return f"cannot tell: a difference below {detectable:.1f} would not reliably show"


def compare(counts: np.ndarray, metric: Metric, seed: int = 0) -> list[Difference]:
    """Returns the difference of each model but the first from the first.

    counts: (models, seeds, texts, 3, classes), as `count_predictions` returns them. Every model has the same seeds and
    texts. What is found holds for these training texts.

    The interval is Student's t about the mean over seeds, with a variance between seeds and, by a bootstrap, between
    texts. (A bootstrap over so few seeds by itself is too narrow.) All intervals hold together (Bonferroni). The
    p-values are not corrected: they would need more seeds with every model.
    """
    num_models, _, num_texts, *_ = counts.shape
    if num_models == 1:
        return []
    scores = metric(counts.sum(2, dtype=np.float64))  # (models, seeds)
    replicas = _bootstrap_over_texts(counts, metric, np.random.default_rng(seed))  # (models, seeds, replicates)
    alpha = ALPHA / (num_models - 1)
    results = []
    for model in range(1, num_models):
        differences = scores[model] - scores[0]  # (seeds,)
        components = estimate_components(differences, replicas[model] - replicas[0], num_texts)
        error, freedom = components.standard_error(_variance_of_mean(differences))
        margin = float(stats.t.ppf(1 - alpha / 2, freedom) * error)
        mean = float(differences.mean())
        low, high = max(-1.0, mean - margin), min(1.0, mean + margin)
        p = float(sign_flip_p_values(differences))
        results.append(Difference(mean, low, high, p, minimum_detectable_effect(components, alpha)))
    return results


def _bootstrap_over_texts(counts: np.ndarray, metric: Metric, rng: np.random.Generator) -> np.ndarray:
    """Scores (models, seeds, replicates) on texts drawn with replacement, the same for all models and seeds."""
    num_models, num_seeds, num_texts, *rest = counts.shape
    flat = counts.swapaxes(0, 2).reshape(num_texts, -1)  # (texts, seeds * models * 3 * classes)
    scores = []
    for _ in range(0, BOOTSTRAP_REPLICATES, 50):  # a part at a time, as all need much memory
        weights = rng.multinomial(num_texts, np.full(num_texts, 1 / num_texts), size=50).astype(np.float32)
        scores.append(metric((weights @ flat).reshape(-1, num_seeds, num_models, *rest)))
    return np.concatenate(scores).T


class VarianceComponents(NamedTuple):
    """The parts of the variance of a mean difference over S seeds and T texts.

    The difference of seed s on text t is d_st = mu + seed_s + text_t + residual_st, with independent terms. So
    Var(mean) = var_seed / S + var_text / T + var_residual / (S T), the sum of the first three fields.
    """

    seeds: float  # var_seed / S
    texts: float  # var_text / T
    residual: float  # var_residual / (S T)
    num_seeds: int
    num_texts: int

    def standard_error(self, between_seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean's standard error and its degrees of freedom (Satterthwaite, doi 10.2307/3002019).

        between_seeds: estimates of var_seed / S + var_residual / (S T), of any shape: the variance of the seeds'
        differences over their number. It and the variance between texts both hold the residual, which counts once.
        """
        between_texts = self.texts + self.residual
        variance = np.maximum(between_seeds - self.residual, 0) + between_texts
        seeds_part = between_seeds**2 / max(1, self.num_seeds - 1)
        texts_part = between_texts**2 / max(1, self.num_texts - 1)
        return np.sqrt(variance), variance**2 / (seeds_part + texts_part)


def estimate_components(differences: np.ndarray, replicas: np.ndarray, num_texts: int) -> VarianceComponents:
    """Estimates the components from differences (seeds,) and their bootstrap replicas over texts (seeds, replicates).

    Over replicas, one seed's difference has the variance (var_text + var_residual) / T and the mean over seeds the
    variance var_text / T + var_residual / (S T). The first exceeds the second by S - 1 times the residual component.
    """
    num_seeds = len(differences)
    one_seed = _correct_bootstrap(float(replicas.var(1).mean()), num_texts)
    mean_of_seeds = _correct_bootstrap(float(replicas.mean(0).var()), num_texts)
    residual = max(0.0, (one_seed - mean_of_seeds) / (num_seeds - 1)) if num_seeds > 1 else 0.0
    seeds = max(0.0, float(_variance_of_mean(differences)) - residual)
    return VarianceComponents(seeds, max(0.0, mean_of_seeds - residual), residual, num_seeds, num_texts)


def _correct_bootstrap(variance: float, num_texts: int) -> float:
    """A bootstrap takes its texts for the population, so it is too narrow by (T - 1) / T, and sees no variance where
    all texts agree. Of one more text it knows nothing, so the weight of one text is added."""
    return variance * num_texts / max(1, num_texts - 1) + num_texts**-2


def _variance_of_mean(differences: np.ndarray) -> np.ndarray:
    """The variance (...) of the mean of differences (..., seeds), as they vary between seeds; 0 for one seed."""
    num_seeds = differences.shape[-1]
    return differences.var(-1, ddof=min(1, num_seeds - 1)) / num_seeds


def sign_flip_p_values(differences: np.ndarray) -> np.ndarray:
    """Returns two-sided p-values (...) for differences (..., seeds), by the sign-flip permutation test over seeds. It
    is the share of all combinations of signs that give as large a mean. With n seeds the least is 2 / 2**n."""
    num_seeds = differences.shape[-1]
    if num_seeds <= MOST_SEEDS_WITH_ALL_SIGNS:
        signs = np.array(list(product((1.0, -1.0), repeat=num_seeds)))  # (combinations, seeds)
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), (RANDOM_SIGNS, num_seeds))
        signs[0] = 1.0  # what was observed is one of the possibilities
    flipped = np.abs(differences @ signs.T)  # (..., combinations)
    return (flipped >= np.abs(differences.sum(-1, keepdims=True)) - 1e-9).mean(-1)


def minimum_detectable_effect(components: VarianceComponents, alpha: float) -> float:
    """Returns the true difference that a share POWER of experiments, simulated with these components, call better."""
    num_seeds = components.num_seeds
    if 2 / 2**num_seeds > ALPHA:
        return np.inf
    rng = np.random.default_rng(0)
    text_noise = rng.normal(0, components.texts**0.5, (SIMULATED_EXPERIMENTS, 1))
    seed_scale = ((components.seeds + components.residual) * num_seeds) ** 0.5
    noise = text_noise + rng.normal(0, seed_scale, (SIMULATED_EXPERIMENTS, num_seeds))  # differences without an effect
    error, freedom = components.standard_error(_variance_of_mean(noise))  # (experiments,) each
    margin = stats.t.ppf(1 - alpha / 2, freedom) * error

    def power(effect: float) -> float:
        differences = noise + effect
        return float(((differences.mean(1) > margin) & (sign_flip_p_values(differences) <= ALPHA)).mean())

    low, high = 0.0, 20 * float(error.mean())
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return min(high, 1.0)
