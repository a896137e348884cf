"""A run's plan: after which steps something is due, how many are left, at which rate, and how long that takes."""

import math
from dataclasses import replace
from itertools import product

import pytest

from mlm.errors import UserError
from mlm.training.plan import Plan, Timings, cooldown_start, cooldown_steps, learning_rate_at, resolve, time_left
from mlm.training.progress import Progress


def plan_of(
    steps: int, epoch: int, evaluate_every: int = 4, save_every: int | None = None, decay_from: int = 0
) -> Plan:
    return Plan(
        steps=steps, steps_per_epoch=epoch, warmup_steps=0, decay_from=decay_from, peak_learning_rate=1.0,
        evaluate_every=evaluate_every, save_every=save_every, first_test_chunks=70, test_chunks=80,
        tokens_per_step=100, positions_per_step=110,
    )  # fmt: skip


LENGTHS = (1, 2, 13, 20)
TENTHS = {0: 0, 1: 1, 9: 1, 10: 1, 11: 2, 20: 2, 21: 3, 30: 3}  # rounded up


@pytest.mark.parametrize("save_every", [None, 1, 3, 4, 50])
def test_saves_are_predicted_from_every_step_as_they_then_come(save_every):
    """At the ends of epochs and of every `save_every` steps, before a cool-down, and never after the last step: counted
    one by one."""
    for steps, epoch, start in product(LENGTHS, (1, 3, 8, 40), (0, 3, 12)):
        plan = plan_of(steps, epoch, save_every=save_every, decay_from=start)
        due = [step for step in range(1, steps) if step % epoch == 0 or (save_every and step % save_every == 0)]
        due = sorted({*due, *([start] if 0 < start < steps else [])})
        assert [step for step in range(steps + 1) if plan.is_save_due(step)] == due
        for done in range(steps + 1):
            assert plan.saves_left(done) == len([step for step in due if step > done])


def test_evaluations_come_before_the_first_step_when_due_and_after_the_last():
    for steps, every in product(LENGTHS, (1, 4, 5, 40)):
        plan = plan_of(steps, epoch=3, evaluate_every=every)
        due = [step for step in range(steps + 1) if step % every == 0 or step == steps]
        assert [step for step in range(steps + 1) if plan.is_evaluation_due(step)] == due
        for done in range(steps + 1):
            middle = [step for step in due if done < step < steps]
            assert list(plan.middle_evaluations(done)) == middle


def test_the_schedule_warms_up_decays_and_never_trains_at_zero():
    rates = [learning_rate_at(step, peak=1.0, warmup_steps=4, decay_from=4, total_steps=10) for step in range(10)]
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert plan_of(10, 3).learning_rate(0) == 1.0 and plan_of(10, 3).learning_rate(9) == pytest.approx(0.1)


def test_a_constant_rate_is_held_until_the_cooldown():
    rates = [learning_rate_at(step, peak=1.0, warmup_steps=2, decay_from=7, total_steps=10) for step in range(10)]
    assert rates == pytest.approx([1 / 2, 1, 1, 1, 1, 1, 1, 3 / 3, 2 / 3, 1 / 3])
    plan = plan_of(10, 3, decay_from=7)
    assert [plan.learning_rate(step) for step in range(10)][6:] == pytest.approx([1, 1, 2 / 3, 1 / 3])


def test_a_linear_rate_has_the_bits_of_its_formula():
    for total, warmup in product(range(1, 40), range(40)):
        for step in range(total):
            decay = 3e-5 * ((total - step) / max(1, total - warmup))
            rate = 3e-5 * ((step + 1) / warmup) if step < warmup else decay
            assert learning_rate_at(step, 3e-5, warmup, warmup, total) == rate


def test_the_cooldown_is_a_tenth_of_the_steps_before_it_and_as_late_as_it_fits():
    assert {done: cooldown_steps(done) for done in TENTHS} == TENTHS
    for total in range(1, 300):
        start = cooldown_start(0, total)
        assert start + -(-start // 10) <= total < start + 1 + -(-(start + 1) // 10)
        for warmup in (start, start + 1, total):  # which is not cut short
            assert cooldown_start(warmup, total) == warmup
    assert [cooldown_start(0, total) for total in (1, 2, 11, 12, 33)] == [0, 1, 10, 10, 30]


def test_an_early_stop_ends_the_plan_a_tenth_later_and_before_its_end():
    plan = plan_of(110, 7, decay_from=100)
    assert plan.cooling_down_from(None) is plan
    for step in range(1, 100):
        stopped = plan.cooling_down_from(step)
        assert stopped.steps == step + math.ceil(step / 10) < 110 and stopped.cooldown_from == step
        rates = [stopped.learning_rate(done) for done in range(stopped.steps)]
        assert rates[: step + 1] == [1.0] * (step + 1) and rates == sorted(rates, reverse=True) and rates[-1] > 0


def test_only_a_constant_rate_has_a_cooldown():
    assert replace(plan_of(10, 3), warmup_steps=4, decay_from=4).cooldown_from is None
    assert replace(plan_of(10, 3), warmup_steps=4, decay_from=5).cooldown_from == 5


def test_a_checkpoint_keeps_its_dropout_and_is_continued_at_a_rate_that_suits_its_width(settings):
    bert = settings(initial_pretrain_model="bert", initial_pretrain_tokenizer="bert")
    of_width = {width: resolve(bert, 40, "no", width) for width in (1024, 768, 384)}
    assert all(config.hidden_dropout is None for config in of_width.values())
    assert [config.learning_rate for config in of_width.values()] == pytest.approx([1.6875e-5, 3e-5, 1.2e-4])
    assert resolve(replace(bert, learning_rate=1e-3), 40, "no", 384).learning_rate == 1e-3


def test_settings_that_were_left_unset_are_resolved_once(settings):
    resolved = resolve(settings(num_epochs=3, num_warmup_steps=0.1), epoch_steps=40, precision="no", width=128)
    assert (resolved.max_steps, resolved.num_warmup_steps, resolved.learning_rate) == (120, 12, 2e-3)
    assert (resolved.eval_every, resolved.save_every, resolved.hidden_dropout) == (40, None, 0.0)
    assert resolve(resolved, 40, "no", 128) == resolved
    assert resolve(settings(hidden_dropout=0.2), 40, "no", 128).hidden_dropout == 0.2
    with pytest.raises(UserError, match="num_warmup_steps"):
        resolve(settings(num_epochs=1, num_warmup_steps=50), epoch_steps=40, precision="no", width=128)


TIMINGS = Timings()
TIMINGS.score_chunk, TIMINGS.write_results, TIMINGS.save_checkpoint = 0.1, 3.0, 7.0


def test_the_time_left_is_that_of_steps_evaluations_and_checkpoints():
    plan = plan_of(20, epoch=8, evaluate_every=5, save_every=4)
    left = time_left(plan, Progress(step=10, last_evaluated_step=10, sampled_chunks=50), TIMINGS, seconds_per_step=2.0)
    # Evaluations after steps 15 (50 chunks) and 20 (80); checkpoints after steps 12 and 16; final/ once.
    assert (left.evaluations, left.test_chunks, left.checkpoints) == (2, 130, 2)
    assert left.seconds == pytest.approx(10 * 2 + 130 * 0.1 + 3 * 3.0 + 2 * 7.0)
    at_the_start = time_left(plan, Progress(sampled_chunks=50), TIMINGS, seconds_per_step=2.0)
    assert (at_the_start.evaluations, at_the_start.test_chunks) == (5, 70 + 3 * 50 + 80)


def test_checkpoints_that_nobody_asked_for_are_predicted_as_seldom_as_they_are_affordable():
    plan = plan_of(100, epoch=10)
    # One costs 7 s, so 140 s lie between two: at 2 s a step 7 epochs of 20 s.
    assert time_left(plan, Progress(), TIMINGS, seconds_per_step=2.0).checkpoints == 1 + 8 // math.ceil(140 / 20)
    assert time_left(plan, Progress(), TIMINGS, seconds_per_step=100.0).checkpoints == 9
    assert time_left(plan, Progress(step=95), TIMINGS, seconds_per_step=2.0).checkpoints == 0


def test_what_a_kill_can_cost_is_the_time_between_two_checkpoints():
    def of(seconds_per_step, save_every=None):
        left = time_left(plan_of(100, epoch=10, save_every=save_every), Progress(), TIMINGS, seconds_per_step)
        return left.unsaved_seconds, left.checkpoints

    assert of(2.0) == (140, 2)  # seven epochs, as one of 7 s is to cost a twentieth
    assert of(100.0) == (1000, 9)  # each epoch
    assert of(1000.0) == (1800, 55)  # half an hour of the 10,000 s that an epoch takes
    assert of(1000.0, save_every=25) == (10_000, 11)  # as the user wants it
    assert of(0.1) == (10, 1)  # all steps


@pytest.mark.parametrize(("epoch", "every"), [(1, 1), (10_000, 10_000), (10_001, 5001), (3_125_000, 9985)])
def test_a_long_epoch_does_not_make_the_first_evaluation_wait(settings, epoch, every):
    assert resolve(settings(), epoch_steps=epoch, precision="no", width=128).eval_every == every
    assert resolve(settings(eval_every=7), epoch_steps=epoch, precision="no", width=128).eval_every == 7
