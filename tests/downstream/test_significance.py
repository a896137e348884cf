"""Verdicts of downstream.py: intervals that hold the truth, few false alarms, and effects that are found."""

import numpy as np
import pytest
from scipy import stats

from mlm.downstream import significance
from mlm.downstream.metrics import accuracy, macro_f1
from mlm.downstream.significance import Difference, compare, sign_flip_p_values

NOISE = 0.5  # of a prediction beside what model, seed and text decide


def draw_experiment(draw, seeds: int, texts: int, effect: float, seed_spread: float) -> np.ndarray:
    """Counts (2, seeds, texts, 3, 1) of correct predictions: two models on texts of different difficulty; the second is
    better by `effect` on a latent scale, more on some texts than on others."""
    difficulty = draw.normal(0.8, 1, (1, texts))
    suits_second = draw.normal(effect, 0.5, (1, texts))
    right = [
        difficulty + shift + draw.normal(0, seed_spread, (seeds, 1)) + draw.normal(0, NOISE, (seeds, texts)) > 0
        for shift in (0, suits_second)
    ]
    right = np.stack(right).astype(np.float32)
    return np.stack([right, np.ones_like(right), np.ones_like(right)], axis=-1)[..., None]


def true_difference(effect: float, seed_spread: float) -> float:
    """The expected difference of the models' accuracies, over seeds and texts."""
    own = 1 + seed_spread**2 + NOISE**2
    return stats.norm.cdf((0.8 + effect) / (own + 0.25) ** 0.5) - stats.norm.cdf(0.8 / own**0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("texts", "seed_spread"), [(300, 0.0), (300, 0.1), (500, 0.3)])
def test_of_200_intervals_90_to_99_percent_hold_the_true_difference(texts, seed_spread):
    draw = np.random.default_rng(texts)
    truth = true_difference(0.2, seed_spread)
    differences = [compare(draw_experiment(draw, 6, texts, 0.2, seed_spread), accuracy, seed)[0] for seed in range(200)]
    assert 0.9 <= np.mean([found.low <= truth <= found.high for found in differences]) <= 0.99


@pytest.mark.slow
def test_the_minimum_detectable_effect_is_found_four_times_in_five():
    draw = np.random.default_rng(5)
    smallest = np.median(
        [compare(draw_experiment(draw, 6, 300, 0, 0.1), accuracy, s)[0].minimum_detectable_effect for s in range(20)]
    )
    [latent] = [effect for effect in np.arange(0.1, 2, 0.01) if true_difference(effect, 0.1) >= smallest][:1]
    verdicts = [compare(draw_experiment(draw, 6, 300, latent, 0.1), accuracy, s)[0].verdict for s in range(100)]
    assert 0.65 <= verdicts.count("better") / 100 <= 0.95


def test_equal_models_are_seldom_called_different():
    # 0.148 on the latent scale makes up for the second model's greater spread
    [latent] = [effect for effect in np.arange(0, 0.3, 0.001) if true_difference(effect, 0.1) >= 0][:1]
    draw = np.random.default_rng(7)
    verdicts = [compare(draw_experiment(draw, 6, 200, latent, 0.1), accuracy, seed)[0].verdict for seed in range(60)]
    assert verdicts.count("cannot tell") >= 57


def test_flipped_signs_agree_with_scipys_permutation_test():
    differences = np.random.default_rng(0).normal(0.5, 1, 8)
    expected = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True, axis=-1
    )
    assert sign_flip_p_values(differences) == pytest.approx(expected.pvalue)


def test_the_least_p_value_is_two_of_all_signs():
    for seeds in (3, 6, 10):
        assert sign_flip_p_values(np.full(seeds, 0.01)) == pytest.approx(2 / 2**seeds)
        assert sign_flip_p_values(np.zeros(seeds)) == pytest.approx(1)


def test_several_models_raise_no_more_false_alarms_than_one():
    """Of four further models that are no better than the first, is any called better or worse?"""
    [latent] = [effect for effect in np.arange(0, 0.3, 0.001) if true_difference(effect, 0.1) >= 0][:1]
    draw, alarms = np.random.default_rng(3), 0
    for seed in range(40):
        first, *others = (draw_experiment(draw, 6, 100, latent, 0.1) for _ in range(5))
        models = np.concatenate([first[:1], *(other[1:] for other in others)])
        alarms += any(difference.verdict != "cannot tell" for difference in compare(models, accuracy, seed))
    assert alarms <= 5


def test_a_third_model_close_to_the_first_does_not_hide_a_clear_second():
    draw = np.random.default_rng(4)
    two = draw_experiment(draw, 6, 200, 1.5, 0.05)
    close = two[:1].copy()
    for seed in range(6):  # one text more, one text less, in turn
        text = np.flatnonzero(close[0, seed, :, 0, 0] == seed % 2)[0]
        close[0, seed, text, 0, 0] = 1 - seed % 2
    differences = compare(np.concatenate([two, close]), accuracy)
    assert [difference.verdict for difference in differences] == ["better", "cannot tell"]


def test_variance_components_are_those_that_differences_were_drawn_with():
    """d_st = seed_s + text_t + residual_st for 8 seeds and 150 texts; the estimates' mean over 200 experiments."""
    seeds, texts, variances = 8, 150, np.array([0.4, 30.0, 90.0])  # of seed_s, text_t and residual_st
    draw = np.random.default_rng(0)
    found = []
    for _ in range(200):
        seed_part, text_part, residual = (
            draw.normal(0, variance**0.5, shape)
            for variance, shape in zip(variances, [(seeds, 1), (1, texts), (seeds, texts)], strict=True)
        )
        differences = seed_part + text_part + residual
        weights = draw.multinomial(texts, np.full(texts, 1 / texts), size=200) / texts
        found.append(significance.estimate_components(differences.mean(1), differences @ weights.T, texts)[:3])
    expected = variances / [seeds, texts, seeds * texts]
    assert np.mean(found, 0) == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize("variances", [(1, 0, 1), (2, 0, 1), (1, 0.1, 0.5), (1, 1, 0), (0, 1, 1)])
def test_the_standard_error_and_its_freedom_cover_at_95_percent(variances):
    """For normal differences with these variances of the mean: of seeds, texts and residual, the latter two known."""
    draw, seeds, draws = np.random.default_rng(0), 6, 20_000
    of_seeds, of_texts, residual = variances
    chance = draw.normal(0, of_texts**0.5, (draws, 1))
    chance = chance + draw.normal(0, ((of_seeds + residual) * seeds) ** 0.5, (draws, seeds))
    spread = significance.VarianceComponents(of_seeds, of_texts, residual, seeds, 1000)
    error, freedom = spread.standard_error(chance.var(1, ddof=1) / seeds)
    covered = np.abs(chance.mean(1)) <= stats.t.ppf(0.975, freedom) * error
    assert 0.94 <= covered.mean() <= 0.985


@pytest.mark.parametrize("texts", [1, 2, 3, 5])
def test_a_handful_of_texts_proves_nothing(texts):
    """However clear: the second model is always right, the first never."""
    right = np.stack([np.zeros((6, texts)), np.ones((6, texts))]).astype(np.float32)
    [difference] = compare(np.stack([right, np.ones_like(right), np.ones_like(right)], -1)[..., None], accuracy)
    assert difference.mean == 1 and difference.low >= -1 and difference.high <= 1
    assert difference.verdict == "cannot tell" or texts > 3


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
    [difference] = compare(counts, accuracy)
    error = (0.25 * 0.75 / texts) ** 0.5
    assert difference.mean == pytest.approx(-0.25)
    assert (difference.high - difference.low) / 2 == pytest.approx(1.97 * error, rel=0.1)
    assert (
        difference.minimum_detectable_effect == np.inf and difference.verdict == "cannot tell"
    )  # one seed tells nothing


def test_equal_predictions_have_no_difference():
    draw = np.random.default_rng(0)
    one = draw_experiment(draw, 6, 100, 0, 0.1)[:1]
    [difference] = compare(np.concatenate([one, one]), accuracy)
    assert (difference.mean, difference.p, difference.verdict) == (0, 1, "cannot tell")
    assert -0.05 < difference.low < 0 < difference.high < 0.05  # of a hundred more texts nobody knows


def test_macro_f1_has_an_interval_too():
    draw = np.random.default_rng(2)
    actual, one_hot = draw.integers(0, 3, 200), np.eye(3, dtype=bool)

    def count(share_known):
        is_known = draw.random((6, 200)) < share_known
        predicted = one_hot[np.where(is_known, actual, draw.integers(0, 3, (6, 200)))]  # (seeds, texts, classes)
        counts = [predicted & one_hot[actual], predicted, np.broadcast_to(one_hot[actual], (6, 200, 3))]
        return np.stack(counts, axis=2).astype(np.float32)

    [difference] = compare(np.stack([count(0.5), count(0.8)]), macro_f1)
    assert difference.verdict == "better" and difference.low < 0.2 < difference.high


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        (Difference(0.02, 0.01, 0.03, 0.03, 0.01), "better"),
        (Difference(-0.02, -0.03, -0.01, 0.03, 0.01), "worse"),
        (Difference(0.02, -0.01, 0.05, 0.03, 0.01), "cannot tell"),
        (Difference(0.02, 0.01, 0.03, 0.06, 0.01), "cannot tell"),
    ],
)
def test_both_interval_and_permutation_test_must_rule_chance_out(difference, verdict):
    assert difference.verdict == verdict


def test_many_seeds_draw_signs_at_random():
    seeds = significance.MOST_SEEDS_WITH_ALL_SIGNS + 3
    p = sign_flip_p_values(np.full(seeds, 0.5))
    assert 0 < p <= 5 / significance.RANDOM_SIGNS
