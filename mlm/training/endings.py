"""When a run ends: after its last step, on a signal, where it diverges, and early where it gains nothing any more."""

from dataclasses import replace

from mlm.evaluation.loss import Evaluation, compare
from mlm.runtime.distributed import decide_on_main
from mlm.terminal import say
from mlm.training.progress import Progress
from mlm.training.run import Ending, Learner, Setup
from mlm.training.step import has_finite_weights, max_consecutive_skips


def find_ending(setup: Setup, progress: Progress, learner: Learner, is_stopped: bool) -> Ending | None:
    """Returns why the run ends now, or None where it goes on. Weights that are to be saved are checked to be finite."""
    if setup.config.evaluate_only:
        return Ending.EVALUATED
    is_finished = progress.step == setup.plan.steps
    is_skipping = progress.skipped_in_a_row >= max_consecutive_skips(learner.accelerator)
    ends = is_finished or is_skipping or is_stopped
    if (ends or setup.plan.is_save_due(progress.step)) and not has_finite_weights(learner.bert):
        return Ending.BROKEN
    if is_skipping:
        return Ending.SKIPPING
    if is_stopped:
        return Ending.STOPPED
    return Ending.FINISHED if is_finished else None


def stop_early(setup: Setup, progress: Progress, learner: Learner, evaluation: Evaluation) -> Setup:
    """Returns the setup, with a plan that ends by a cool-down from here where `early_stop_evals` evaluations in a row
    saw no sure gain; those in the warm-up do not count.

    A gain is sure where the whole 95% interval of the paired change lies below 0, since the last evaluation of a sure
    gain, at first the baseline: of a loss that falls slowly, but falls, no evaluation may surely beat the one before.
    """
    patience, step = setup.config.early_stop_evals, progress.step
    if patience is None or not 0 < step < setup.plan.decay_from:
        return setup
    reference = progress.gained or progress.baseline
    assert reference, "the baseline is evaluated before the first step"
    sample = evaluation.first(progress.sampled_chunks)
    if decide_on_main(learner.accelerator, lambda: compare(reference, sample).high < 0):
        progress.gained, progress.gained_step, progress.evaluations_without_gain = sample, step, 0
    elif step > setup.plan.warmup_steps:
        progress.evaluations_without_gain += 1
    if progress.evaluations_without_gain < patience:
        return setup
    progress.cooldown_from = step
    plan = setup.plan.cooling_down_from(step)
    since = f"step {progress.gained_step}" if progress.gained_step else "the baseline"
    falls = f"the learning rate falls to 0 over the next {plan.steps - step} step(s), the last of this run"
    say(f"step {step}: {patience} evaluation(s) in a row saw no sure gain since {since}; {falls}")
    return replace(setup, plan=plan)
