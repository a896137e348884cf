"""A run's plan: how many steps, at which learning rate, after which of them something is due, and the time it takes."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from Config import SCRATCH_SIZES, Config
from mlm.data.chunks import Chunks, Corpus, steps_per_epoch
from mlm.encoder.families import USUAL, Habits
from mlm.errors import UserError
from mlm.evaluation.loss import Evaluation
from mlm.text.files import text_folder
from mlm.training.progress import Progress

# All evaluations but the last score a sample of the test chunks, where all of them would take too long.
SAMPLE_ERROR = 0.01  # the standard error wanted of a loss, in nats: one per cent of the perplexity
TYPICAL_LOSS_STD = 4.0  # nats, of a masked token's loss once a model has learned something: 1.8 to 3.8 in four runs
LARGEST_EVALUATION_SHARE = 0.05  # of training's work: for the first, and for all between it and the last together
SMALLEST_SAMPLE = 256  # chunks, whatever share they are
MOST_STEPS_UNEVALUATED = 10_000  # where eval_every is unset
STEP_IN_FORWARD_PASSES = 3  # a training step is a forward pass, and a backward pass of about twice its work

# Where learning_rate is unset and a checkpoint is continued: that of BERT-base. A narrower model wants more: by the
# square of the widths' ratio it is within what the sweep in benchmarks/RESULTS.md, "The recipe", found to gain.
CONTINUED_RATE, CONTINUED_WIDTH = 3e-5, 768

# Where save_every is unset: checkpoints at the ends of epochs and at least so often, up to a share of the time.
LARGEST_SAVE_SHARE = 0.05
LONGEST_UNSAVED_S = 1800.0


def resolve(config: Config, epoch_steps: int, precision: str, width: int, of_family: Habits = USUAL) -> Config:
    """Returns the configuration with the value that each unset setting stands for, for epochs of `epoch_steps`.

    Two may stay unset: `micro_batch_tokens`, which the device decides, and `save_every`, as checkpoints at the ends of
    epochs alone are saved only as often as costs little. precision: that of forward passes; width: the model's hidden
    size; of_family: what its family was pre-trained with. Raises UserError where settings do not fit together.
    """
    total_steps = config.max_steps or config.num_epochs * epoch_steps
    warmup_steps = config.num_warmup_steps
    if warmup_steps < 1:  # a share of all steps
        warmup_steps = round(warmup_steps * total_steps)
    if warmup_steps > total_steps:
        raise UserError(f"num_warmup_steps: {warmup_steps:g} is more than the {total_steps} steps of num_epochs")
    evaluations_per_epoch = math.ceil(epoch_steps / MOST_STEPS_UNEVALUATED)
    size = SCRATCH_SIZES[config.scratch_size] if config.scratch_size else None
    usual_rate = size.learning_rate if size else CONTINUED_RATE * (CONTINUED_WIDTH / width) ** 2
    return replace(
        config,
        path_datasets=str(text_folder(config)),
        max_steps=total_steps,
        optimizer=("muon" if size else "adamw") if config.optimizer == "auto" else config.optimizer,
        num_warmup_steps=warmup_steps,
        mlm_probability=config.mlm_probability or of_family.mlm_probability,
        weight_decay=of_family.weight_decay if config.weight_decay is None else config.weight_decay,
        learning_rate=config.learning_rate or usual_rate,
        hidden_dropout=0.0 if size and config.hidden_dropout is None else config.hidden_dropout,
        eval_every=config.eval_every or math.ceil(epoch_steps / evaluations_per_epoch),
        mixed_precision=cast(Any, precision),
    )


def learning_rate_at(step: int, peak: float, warmup_steps: int, decay_from: int, total_steps: int) -> float:
    """Returns the rate of the step after `step` others: linear warm-up to the peak, which is held until `decay_from`
    steps are done, then linear decay; never 0."""
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)
    return peak * min(1.0, (total_steps - step) / max(1, total_steps - decay_from))


def cooldown_steps(done: int) -> int:
    """Returns in how many steps the rate falls after `done` others: a tenth of them, rounded up. So few suffice: Hägele
    et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations (arXiv 2405.18392)."""
    return math.ceil(done / 10)


def cooldown_start(warmup_steps: int, total_steps: int) -> int:
    """Returns after how many steps a constant rate begins to fall: so late that `cooldown_steps` are left, or when the
    warm-up ends."""
    return max(warmup_steps, total_steps * 10 // 11)


@dataclass(frozen=True)
class Plan:
    """The numbers that follow from settings and text; "after a step" counts the steps done."""

    steps: int  # of the optimizer, in all
    steps_per_epoch: int
    warmup_steps: int
    decay_from: int  # steps done before the learning rate falls: those of the warm-up, unless it is constant after that
    peak_learning_rate: float
    evaluate_every: int  # steps
    save_every: int | None  # steps; None: at the ends of epochs, and by the clock, as long as that costs little
    first_test_chunks: int  # that the evaluation before training scores
    test_chunks: int  # that the last evaluation scores
    tokens_per_step: int  # on average
    positions_per_step: int  # on average, with [CLS] and [SEP]
    general_chunks: int = 0  # in a step, of general text

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of the step after `step` others."""
        return learning_rate_at(step, self.peak_learning_rate, self.warmup_steps, self.decay_from, self.steps)

    @property
    def cooldown_from(self) -> int | None:
        """The steps done before a constant learning rate begins to fall; None where it is never constant."""
        return self.decay_from if self.decay_from > self.warmup_steps else None

    def cooling_down_from(self, step: int | None) -> "Plan":
        """Returns the plan where an early stop begins the cool-down after a step at a constant rate, so that the run
        ends before it was to; None: the plan as it is."""
        return self if step is None else replace(self, decay_from=step, steps=step + cooldown_steps(step))

    def epochs(self, step: int) -> float:
        """Returns how many epochs the first `step` steps are."""
        return step / self.steps_per_epoch

    def middle_evaluations(self, done: int = 0) -> range:
        """Returns the steps beyond `done`, but for the last, after which the model is evaluated."""
        return _multiples(self.evaluate_every, done, self.steps)

    @property
    def chunks_at_the_ends(self) -> dict[int, int]:
        """How many test chunks the first and the last evaluation score, by their steps."""
        return {0: self.first_test_chunks, self.steps: self.test_chunks}

    def is_evaluation_due(self, step: int) -> bool:
        """Whether the model is evaluated after a step: before the first, when due, and after the last."""
        return step in (0, self.steps) or step in self.middle_evaluations()

    def is_save_due(self, step: int) -> bool:
        """Whether a step is the end of an epoch, or of `save_every` steps, or the last before the cool-down, from which
        a run can be extended; and not the end of the run."""
        is_wanted = step == self.cooldown_from or step % self.steps_per_epoch == 0
        return 0 < step < self.steps and (is_wanted or (self.save_every is not None and step % self.save_every == 0))

    def saves_left(self, done: int) -> int:
        """Returns how many of the steps beyond `done` are such that `is_save_due`."""
        epoch, other = self.steps_per_epoch, self.save_every or self.steps_per_epoch
        due = [_multiples(interval, done, self.steps) for interval in (epoch, other, math.lcm(epoch, other))]
        start = self.cooldown_from
        adds_one = start is not None and done < start < self.steps and start % epoch != 0 and start % other != 0
        return len(due[0]) + len(due[1]) - len(due[2]) + adds_one


def _multiples(of: int, above: int, below: int) -> range:
    return range(of * (above // of + 1), below, of)


def make_plan(config: Config, corpus: Corpus) -> Plan:
    """Returns the plan of a resolved configuration for a text."""
    assert config.max_steps and config.learning_rate and config.eval_every, "`resolve` has set them"
    in_a_step = [(corpus.train, config.domain_chunks)]
    if corpus.general and config.general_chunks:
        in_a_step.append((corpus.general.train, config.general_chunks))
    tokens_per_step = sum(len(text.tokens) / steps_per_epoch(len(text), chunks) for text, chunks in in_a_step)
    chunks_per_step = sum(len(text) / steps_per_epoch(len(text), chunks) for text, chunks in in_a_step)
    positions_per_step = round(tokens_per_step + 2 * chunks_per_step)
    warmup_steps = int(config.num_warmup_steps)
    test_chunks = min(len(corpus.test), config.max_test_chunks or len(corpus.test))
    sample = max(SMALLEST_SAMPLE, affordable_chunks(config.max_steps * positions_per_step, corpus.test))
    return Plan(
        steps=config.max_steps,
        steps_per_epoch=steps_per_epoch(len(corpus.train), config.domain_chunks),
        warmup_steps=warmup_steps,
        decay_from=warmup_steps if config.schedule == "linear" else cooldown_start(warmup_steps, config.max_steps),
        peak_learning_rate=config.learning_rate,
        evaluate_every=config.eval_every,
        save_every=config.save_every,
        first_test_chunks=test_chunks if config.evaluate_only else min(test_chunks, sample),
        test_chunks=test_chunks,
        tokens_per_step=round(tokens_per_step),
        positions_per_step=positions_per_step,
        general_chunks=config.general_chunks,
    )


def affordable_chunks(trained_positions: int, test: Chunks) -> int:
    """Returns how many test chunks can be scored in LARGEST_EVALUATION_SHARE of the work that training is."""
    positions = LARGEST_EVALUATION_SHARE * STEP_IN_FORWARD_PASSES * trained_positions
    return int(positions / (2 + len(test.tokens) / len(test)))


def middle_sample(plan: Plan, test: Chunks, baseline: Evaluation) -> int:
    """Returns how many test chunks each evaluation between the first and the last scores, so that they cost little.

    baseline: the evaluation before training. By counts alone, and by no clock, so that a run that is resumed takes the
    same chunks.
    """
    for_the_error = (TYPICAL_LOSS_STD / SAMPLE_ERROR) ** 2 / baseline.masked.mean()
    if math.isfinite(baseline.loss_se):
        for_the_error = max(for_the_error, len(baseline.losses) * (baseline.loss_se / SAMPLE_ERROR) ** 2)
    affordable = affordable_chunks(plan.positions_per_step * plan.steps, test) / max(1, len(plan.middle_evaluations()))
    return round(min(plan.first_test_chunks, max(SMALLEST_SAMPLE, min(for_the_error, affordable))))


# -------------------------------------------------------------------------------------------------------------- time


class Timings:
    """Seconds that each part of a run's work took when it was last done, and when it was last saved."""

    prepare_text = score_chunk = save_checkpoint = 0.0  # score_chunk: with what is scored of general text beside it
    write_results = 0.0  # after an evaluation
    saved_step: int | None = None  # or the one that the run was resumed from
    saved_at = 0.0  # by time.perf_counter; or when training began

    @contextmanager
    def measure(self, part: str, pieces: int = 1) -> Iterator[None]:
        """Times a block that does a part, or as many `pieces` of it."""
        began = time.perf_counter()
        yield
        setattr(self, part, (time.perf_counter() - began) / pieces)

    @property
    def affordable_interval_s(self) -> float:
        """The seconds between two checkpoints that take LARGEST_SAVE_SHARE of the time."""
        return self.save_checkpoint / LARGEST_SAVE_SHARE

    @property
    def longest_interval_s(self) -> float:
        """The seconds after which a checkpoint is saved, wherever an epoch ends."""
        return max(LONGEST_UNSAVED_S, self.affordable_interval_s)


class TimeLeft(NamedTuple):
    """What a run has still to do, and the seconds that it takes."""

    evaluations: int
    test_chunks: int  # scored in all of them together
    checkpoints: int
    step_seconds: float  # of all steps, and so on
    evaluation_seconds: float  # with what is written after each, and the finished model
    checkpoint_seconds: float
    unsaved_seconds: float  # of steps, at most, between two checkpoints: what a kill can cost

    @property
    def seconds(self) -> float:
        return self.step_seconds + self.evaluation_seconds + self.checkpoint_seconds


def time_left(plan: Plan, progress: Progress, timings: Timings, seconds_per_step: float) -> TimeLeft:
    """Returns what is left from where the run stands to its end, each part as fast as it was last."""
    middle = len(plan.middle_evaluations(progress.step))
    at_an_end = [chunks for step, chunks in plan.chunks_at_the_ends.items() if progress.last_evaluated_step < step]
    evaluations = middle + len(at_an_end)
    test_chunks = middle * progress.sampled_chunks + sum(at_an_end)
    step_seconds = (plan.steps - progress.step) * seconds_per_step
    checkpoints = plan.saves_left(progress.step)
    between = seconds_per_step * min(plan.steps_per_epoch, plan.save_every or plan.steps_per_epoch)
    if not plan.save_every:  # at the end of the first epoch, then of as many as are affordable, and each half hour
        epochs_between = max(1, math.ceil(timings.affordable_interval_s / between))
        checkpoints = max(1 + (checkpoints - 1) // epochs_between, int(step_seconds / timings.longest_interval_s))
        between = min(epochs_between * between, timings.longest_interval_s)
    return TimeLeft(
        evaluations=evaluations,
        test_chunks=test_chunks,
        checkpoints=checkpoints,
        step_seconds=step_seconds,
        evaluation_seconds=test_chunks * timings.score_chunk + (evaluations + 1) * timings.write_results,
        checkpoint_seconds=checkpoints * timings.save_checkpoint,
        unsaved_seconds=min(between, step_seconds),
    )
