"""How long the parts of a run's work take, and how long what is left of it will."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from mlm.training.plan import Plan
from mlm.training.progress import Progress

# Where save_every is unset: checkpoints at the ends of epochs and at least so often, up to a share of the time.
LARGEST_SAVE_SHARE = 0.05
LONGEST_UNSAVED_S = 1800.0


class Timings:
    """Seconds that each part of a run's work took when it was last done, and when it was last saved."""

    prepare_text = score_chunk = save_checkpoint = 0.0
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
    at_an_end = sum(progress.last_evaluated_step < step for step in (0, plan.steps))
    evaluations = middle + at_an_end
    test_chunks = middle * progress.sampled_chunks + at_an_end * plan.test_chunks
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
