"""How long the rest of a run takes, by what was measured of its speed."""

import math
from typing import NamedTuple

from mlm.evaluation import Evaluation, sample_size
from mlm.state import LARGEST_SAVE_SHARE, Progress, Run


class Work(NamedTuple):
    """What a run has still to do."""

    steps: int
    test_chunks: int  # to score, in all evaluations together
    evaluations: int  # after training began


def work_left(run: Run, progress: Progress) -> Work:
    """From where the run stands to its end."""
    config, step = run.config, progress.step
    before_the_last = config.max_steps - 1
    middle = before_the_last // config.eval_every - min(step, before_the_last) // config.eval_every
    first = int(progress.evaluated < 0)
    last = int(progress.evaluated < config.max_steps)
    test_chunks = middle * progress.sampled_chunks + (first + last) * run.test_chunks
    return Work(config.max_steps - step, test_chunks, middle + last)


def choose_sample(run: Run, start: Evaluation) -> int:
    """How many test chunks the evaluations between the first and the last score, so that they cost little.

    start: the evaluation before training.
    """
    middle_evaluations = (run.config.max_steps - 1) // run.config.eval_every
    training_positions = run.derived["positions_per_step"] * run.config.max_steps
    positions_per_chunk = 2 + len(run.data.test.tokens) / len(run.data.test)
    return sample_size(start, run.test_chunks, training_positions, positions_per_chunk, middle_evaluations)


def checkpoints_to_come(run: Run, steps: int, step_seconds: float) -> int:
    """How many checkpoints will be written in so many steps, as mlm/checkpoint.py decides."""
    epoch, every, steps_before_the_last = run.steps_per_epoch, run.config.save_every, max(0, steps - 1)
    ends_of_epochs = steps_before_the_last // epoch
    if every:
        return ends_of_epochs + steps_before_the_last // every - steps_before_the_last // math.lcm(epoch, every)
    if ends_of_epochs == 0:
        return 0
    epochs_between = math.ceil(run.pace.checkpoint_seconds / LARGEST_SAVE_SHARE / (step_seconds * epoch))
    return 1 + (ends_of_epochs - 1) // max(1, epochs_between)


def seconds_left(run: Run, progress: Progress, step_seconds: float) -> float:
    """Of the whole run: steps, evaluations, what is written after each, checkpoints, and the finished model."""
    work, pace = work_left(run, progress), run.pace
    checkpoints = checkpoints_to_come(run, work.steps, step_seconds)
    return (
        work.steps * step_seconds
        + work.test_chunks * pace.chunk_seconds
        + (work.evaluations + 1) * pace.keeping_seconds
        + checkpoints * pace.checkpoint_seconds
    )
