"""How long the parts of a run's work take, and how long what is left of it will."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from mlm.training.plan import Plan
from mlm.training.progress import Progress

LARGEST_SAVE_SHARE = 0.05  # of the time, for checkpoints at the ends of epochs where save_every is unset


class Timings:
    """Seconds that each part of a run's work took when it was last done, and when it was last saved."""

    prepare_text = score_chunk = 0.0
    write_results = 0.0  # after an evaluation
    save_checkpoint = 0.0
    saved_step: int | None = None  # or the one that the run was resumed from

    def __init__(self):
        self._saved_at = time.perf_counter()

    @contextmanager
    def measure(self, part: str, pieces: int = 1) -> Iterator[None]:
        """Times a block that does a part, or as many `pieces` of it."""
        began = time.perf_counter()
        yield
        setattr(self, part, (time.perf_counter() - began) / pieces)

    def note_save(self, step: int) -> None:
        """Notes that the checkpoint of a step is saved now."""
        self.saved_step, self._saved_at = step, time.perf_counter()

    def is_save_affordable(self) -> bool:
        """Whether one more checkpoint of the same cost keeps the time for them below LARGEST_SAVE_SHARE."""
        return time.perf_counter() - self._saved_at >= self.save_checkpoint / LARGEST_SAVE_SHARE


class TimeLeft(NamedTuple):
    """What a run has still to do, and the seconds that it takes."""

    evaluations: int
    test_chunks: int  # scored in all of them together
    checkpoints: int
    step_seconds: float  # of all steps, and so on
    evaluation_seconds: float  # with what is written after each, and the finished model
    checkpoint_seconds: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.step_seconds + self.evaluation_seconds + self.checkpoint_seconds


def time_left(plan: Plan, progress: Progress, timings: Timings, seconds_per_step: float) -> TimeLeft:
    """Returns what is left from where the run stands to its end, each part as fast as it was last."""
    middle = len(plan.middle_evaluations(progress.step))
    at_an_end = sum(progress.last_evaluated_step < step for step in (0, plan.steps))
    test_chunks = middle * progress.sampled_chunks + at_an_end * plan.test_chunks
    evaluations = middle + at_an_end
    checkpoints = plan.saves_left(progress.step)
    if not plan.save_every and checkpoints:  # at the end of the first epoch, and then of as many as are affordable
        seconds_per_epoch = seconds_per_step * plan.steps_per_epoch
        epochs_between = max(1, math.ceil(timings.save_checkpoint / LARGEST_SAVE_SHARE / seconds_per_epoch))
        checkpoints = 1 + (checkpoints - 1) // epochs_between
    return TimeLeft(
        evaluations=evaluations,
        test_chunks=test_chunks,
        checkpoints=checkpoints,
        step_seconds=(plan.steps - progress.step) * seconds_per_step,
        evaluation_seconds=test_chunks * timings.score_chunk + (evaluations + 1) * timings.write_results,
        checkpoint_seconds=checkpoints * timings.save_checkpoint,
    )
