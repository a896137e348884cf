"""The answer of downstream.py: intervals that hold the truth, tests that raise no false alarm, gains that show."""

from functools import partial

import numpy as np
import pytest
from scipy import stats

from mlm.downstream import significance as comparison
from mlm.downstream.metrics import accuracy, macro_f1
from mlm.downstream.significance import Gain, compare, flip_signs

NOISE = 0.5  # of an answer beside what model, seed and text decide


def draw_experiment(draw, seeds: int, texts: int, gain: float, seed_spread: float) -> np.ndarray:
    """Counts (2, seeds, texts, 3, 1) of right answers: two models on texts of different difficulty; the second is
    better by `gain` on a latent scale, more on some texts than on others."""
    difficulty = draw.normal(0.8, 1, (1, texts))
    suits_second = draw.normal(gain, 0.5, (1, texts))
    right = [
        difficulty + shift + draw.normal(0, seed_spread, (seeds, 1)) + draw.normal(0, NOISE, (seeds, texts)) > 0
        for shift in (0, suits_second)
    ]
    right = np.stack(right).astype(np.float32)
    return np.stack([right, np.ones_like(right), np.ones_like(right)], axis=-1)[..., None]


def true_gain(gain: float, seed_spread: float) -> float:
    """The expected difference of the models' accuracies, over seeds and texts."""
    own = 1 + seed_spread**2 + NOISE**2
    return stats.norm.cdf((0.8 + gain) / (own + 0.25) ** 0.5) - stats.norm.cdf(0.8 / own**0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("texts", "seed_spread"), [(300, 0.0), (300, 0.1), (500, 0.3)])
def test_of_200_intervals_90_to_99_percent_hold_the_true_gain(texts, seed_spread):
    draw = np.random.default_rng(texts)
    truth = true_gain(0.2, seed_spread)
    gains = [compare(draw_experiment(draw, 6, texts, 0.2, seed_spread), accuracy, seed)[0] for seed in range(200)]
    assert 0.9 <= np.mean([gain.low <= truth <= gain.high for gain in gains]) <= 0.99


@pytest.mark.slow
def test_the_smallest_gain_shows_four_times_in_five():
    draw = np.random.default_rng(5)
    smallest = np.median([compare(draw_experiment(draw, 6, 300, 0, 0.1), accuracy, s)[0].detectable for s in range(20)])
    [latent] = [gain for gain in np.arange(0.1, 2, 0.01) if true_gain(gain, 0.1) >= smallest][:1]
    verdicts = [compare(draw_experiment(draw, 6, 300, latent, 0.1), accuracy, s)[0].verdict for s in range(100)]
    assert 0.65 <= verdicts.count("better") / 100 <= 0.95


def test_no_gain_is_seldom_taken_for_one():
    # 0.148 on the latent scale makes up for the second model's greater spread
    [latent] = [gain for gain in np.arange(0, 0.3, 0.001) if true_gain(gain, 0.1) >= 0][:1]
    draw = np.random.default_rng(7)
    verdicts = [compare(draw_experiment(draw, 6, 200, latent, 0.1), accuracy, seed)[0].verdict for seed in range(60)]
    assert verdicts.count("cannot tell") >= 57


def test_flipped_signs_agree_with_scipys_permutation_test():
    differences = np.random.default_rng(0).normal(0.5, 1, 8)
    expected = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True, axis=-1
    )
    assert flip_signs(differences) == pytest.approx(expected.pvalue)


def test_the_least_p_value_is_two_of_all_signs():
    for seeds in (3, 6, 10):
        assert flip_signs(np.full(seeds, 0.01)) == pytest.approx(2 / 2**seeds)
        assert flip_signs(np.zeros(seeds)) == pytest.approx(1)


def test_several_models_raise_no_more_false_alarms_than_one():
    """Of four further models that are no better than the first, is any called better or worse?"""
    [latent] = [gain for gain in np.arange(0, 0.3, 0.001) if true_gain(gain, 0.1) >= 0][:1]
    draw, alarms = np.random.default_rng(3), 0
    for seed in range(40):
        first, *others = (draw_experiment(draw, 6, 100, latent, 0.1) for _ in range(5))
        models = np.concatenate([first[:1], *(other[1:] for other in others)])
        alarms += any(gain.verdict != "cannot tell" for gain in compare(models, accuracy, seed))
    assert alarms <= 5


def test_a_third_model_close_to_the_first_does_not_hide_a_clear_second():
    draw = np.random.default_rng(4)
    two = draw_experiment(draw, 6, 200, 1.5, 0.05)
    close = two[:1].copy()
    for seed in range(6):  # one text more, one text less, in turn
        text = np.flatnonzero(close[0, seed, :, 0, 0] == seed % 2)[0]
        close[0, seed, text, 0, 0] = 1 - seed % 2
    gains = compare(np.concatenate([two, close]), accuracy)
    assert [gain.verdict for gain in gains] == ["better", "cannot tell"]


@pytest.mark.parametrize("variances", [(1, 0, 1), (2, 0, 1), (1, 0.1, 0.5), (1, 1, 0), (0, 1, 1)])
def test_the_standard_error_and_its_freedom_cover_at_95_percent(variances):
    """For normal differences with these variances of the mean: of seeds, texts and residual, the latter two known."""
    draw, seeds, draws = np.random.default_rng(0), 6, 20_000
    of_seeds, of_texts, residual = variances
    chance = draw.normal(0, of_texts**0.5, (draws, 1))
    chance = chance + draw.normal(0, ((of_seeds + residual) * seeds) ** 0.5, (draws, seeds))
    spread = comparison.Spread(of_seeds, of_texts, residual, seeds, 1000)
    error, freedom = spread.standard_error(chance.var(1, ddof=1) / seeds)
    covered = np.abs(chance.mean(1)) <= stats.t.ppf(0.975, freedom) * error
    assert 0.94 <= covered.mean() <= 0.985


@pytest.mark.parametrize("texts", [1, 2, 3, 5])
def test_a_handful_of_texts_proves_nothing(texts):
    """However clear: the second model is always right, the first never."""
    right = np.stack([np.zeros((6, texts)), np.ones((6, texts))]).astype(np.float32)
    [gain] = compare(np.stack([right, np.ones_like(right), np.ones_like(right)], -1)[..., None], accuracy)
    assert gain.mean == 1 and gain.low >= -1 and gain.high <= 1
    assert gain.verdict == "cannot tell" or texts > 3


def test_more_models_make_wider_intervals():
    draw = np.random.default_rng(1)
    two = draw_experiment(draw, 6, 200, 0.2, 0.1)
    three = np.concatenate([two, two[1:]])
    [alone], [among, _] = compare(two, accuracy), compare(three, accuracy)
    assert among.mean == alone.mean
    assert among.high - among.low > 1.05 * (alone.high - alone.low)


def test_the_bootstrap_agrees_with_the_binomial_variance():
    """One seed, one model that is always right: the difference varies as a share of a binomial does."""
    texts = 400
    right = np.stack([np.ones((1, texts)), np.arange(texts)[None] % 4 > 0])
    counts = np.stack([right, np.ones_like(right), np.ones_like(right)], -1)[..., None].astype(np.float32)
    [gain] = compare(counts, accuracy)
    error = (0.25 * 0.75 / texts) ** 0.5
    assert gain.mean == pytest.approx(-0.25)
    assert (gain.high - gain.low) / 2 == pytest.approx(1.97 * error, rel=0.1)
    assert gain.detectable == np.inf and gain.verdict == "cannot tell"  # one seed tells nothing


def test_equal_answers_have_no_difference():
    draw = np.random.default_rng(0)
    one = draw_experiment(draw, 6, 100, 0, 0.1)[:1]
    [gain] = compare(np.concatenate([one, one]), accuracy)
    assert (gain.mean, gain.p, gain.verdict) == (0, 1, "cannot tell")
    assert -0.05 < gain.low < 0 < gain.high < 0.05  # of a hundred more texts nobody knows


def test_macro_f1_has_an_interval_too():
    draw = np.random.default_rng(2)
    true = draw.integers(0, 3, 200)

    def count(share_right):
        given = np.where(draw.random((6, 200)) < share_right, true, draw.integers(0, 3, (6, 200)))
        of_class = partial(np.equal, np.arange(3))
        given, wanted = of_class(given[..., None]), np.broadcast_to(of_class(true[:, None]), (6, 200, 3))
        return np.stack([given & wanted, given, wanted], axis=2).astype(np.float32)

    [gain] = compare(np.stack([count(0.5), count(0.8)]), macro_f1)
    assert gain.verdict == "better" and gain.low < 0.2 < gain.high


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        (Gain(0.02, 0.01, 0.03, 0.03, 0.01), "better"),
        (Gain(-0.02, -0.03, -0.01, 0.03, 0.01), "worse"),
        (Gain(0.02, -0.01, 0.05, 0.03, 0.01), "cannot tell"),
        (Gain(0.02, 0.01, 0.03, 0.06, 0.01), "cannot tell"),
    ],
)
def test_both_interval_and_signs_must_rule_chance_out(gain, verdict):
    assert gain.verdict == verdict


def test_many_seeds_draw_signs_at_random():
    seeds = comparison.ALL_FLIPS + 3
    p = flip_signs(np.full(seeds, 0.5))
    assert 0 < p <= 5 / comparison.RANDOM_FLIPS
