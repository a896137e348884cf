"""How long the rest of a run takes, by what was measured of its speed."""

import math
from typing import NamedTuple

from mlm.evaluation.loss import Evaluation, sample_size
from mlm.training.run import LARGEST_SAVE_SHARE, Progress, Run


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


def time_left(run: Run, progress: Progress, seconds_per_step: float) -> TimeLeft:
    """From where the run stands to its end, each kind of work as fast as it was last."""
    config, step, seconds = run.config, progress.step, run.pace.seconds
    before_the_last = config.max_steps - 1
    middle = before_the_last // config.eval_every - min(step, before_the_last) // config.eval_every
    at_an_end = int(progress.evaluated < 0) + int(progress.evaluated < config.max_steps)
    test_chunks = middle * progress.sampled_chunks + at_an_end * run.test_chunks
    checkpoints = checkpoints_to_come(run, config.max_steps - step, seconds_per_step)
    return TimeLeft(
        evaluations=middle + at_an_end,
        test_chunks=test_chunks,
        checkpoints=checkpoints,
        step_seconds=(config.max_steps - step) * seconds_per_step,
        evaluation_seconds=test_chunks * seconds["scoring a chunk"]
        + (middle + at_an_end + 1) * seconds["keeping what was found"],
        checkpoint_seconds=checkpoints * seconds["saving a checkpoint"],
    )


def choose_sample(run: Run, start: Evaluation) -> int:
    """How many test chunks the evaluations between the first and the last score, so that they cost little.

    start: the evaluation before training.
    """
    middle_evaluations = (run.config.max_steps - 1) // run.config.eval_every
    training_positions = run.derived["positions_per_step"] * run.config.max_steps
    positions_per_chunk = 2 + len(run.data.test.tokens) / len(run.data.test)
    return sample_size(start, run.test_chunks, training_positions, positions_per_chunk, middle_evaluations)


def checkpoints_to_come(run: Run, steps: int, seconds_per_step: float) -> int:
    """How many checkpoints will be written in so many steps, as mlm/training/checkpoint.py decides."""
    epoch, every, steps_before_the_last = run.steps_per_epoch, run.config.save_every, max(0, steps - 1)
    save_seconds = run.pace.seconds["saving a checkpoint"]
    ends_of_epochs = steps_before_the_last // epoch
    if every:
        return ends_of_epochs + steps_before_the_last // every - steps_before_the_last // math.lcm(epoch, every)
    if ends_of_epochs == 0:
        return 0
    epochs_between = math.ceil(save_seconds / LARGEST_SAVE_SHARE / (seconds_per_step * epoch))
    return 1 + (ends_of_epochs - 1) // max(1, epochs_between)
