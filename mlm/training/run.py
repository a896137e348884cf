"""A run's state: what is built once, what survives a kill, and how it may end.

Beside these two only the next step's batch lives across steps (StepQueue, mlm/data/packing.py).
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import BertForMaskedLM

from mlm.data.chunks import Corpus
from mlm.data.micro_batches import Divide
from mlm.evaluation.hidden_words import Guess, HiddenWord
from mlm.evaluation.loss import Evaluation
from mlm.training.plan import ResolvedConfig

LARGEST_SAVE_SHARE = 0.05  # of the time, for checkpoints at the ends of epochs where save_every is unset


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is saved in the folder of a run."""
    return run / "checkpoints" / f"step-{step:08}"


Timed = Literal["preparing the text", "scoring a chunk", "keeping what was found", "saving a checkpoint"]


class Pace:
    """What a run's own work was measured to take, and when and after which step it was last saved."""

    def __init__(self):
        self.seconds: dict[Timed, float] = dict.fromkeys(get_args(Timed), 0.0)
        self.saved_step: int | None = None  # or the one that the run was resumed from
        self._saved_at = time.perf_counter()

    @contextmanager
    def timing(self, work: Timed, pieces: int = 1) -> Iterator[None]:
        """Times the block, which does so many pieces of that work."""
        began = time.perf_counter()
        yield
        self.seconds[work] = (time.perf_counter() - began) / pieces

    def is_affordable(self) -> bool:
        """Whether one more checkpoint of the same cost keeps the time for them below LARGEST_SAVE_SHARE."""
        cost = self.seconds["saving a checkpoint"]
        return time.perf_counter() - self._saved_at >= cost / LARGEST_SAVE_SHARE

    def saved(self, step: int) -> None:
        """Notes that the checkpoint of that step is saved."""
        self.saved_step, self._saved_at = step, time.perf_counter()


def derive_numbers(
    accelerator: Accelerator, data: Corpus, bert: BertForMaskedLM, steps_per_epoch: int
) -> dict[str, Any]:
    """Numbers that follow from settings, text and machine, by name."""
    return {
        "devices": f"{accelerator.num_processes} x {accelerator.device.type}",
        "parameters": sum(parameter.numel() for parameter in bert.parameters()),
        "added_words": len(data.added_words),
        "chunks": len(data.train),
        "steps_per_epoch": steps_per_epoch,
        "tokens_per_step": round(len(data.train.tokens) / steps_per_epoch),
        "positions_per_step": round((len(data.train.tokens) + 2 * len(data.train)) / steps_per_epoch),
    }


@dataclass
class Run:
    """What is built once, and kept to the end."""

    config: ResolvedConfig
    accelerator: Accelerator
    folder: Path
    data: Corpus
    hidden_words: list[HiddenWord]  # of the test text, for the guesses before and after
    derived: dict[str, Any]  # what `derive_numbers` returns, and the size of micro-batches; to be shown
    versions: dict[str, str]  # of the libraries
    command: str  # that repeats the run
    recipe: dict[str, Any]  # all that decides the training
    checkpoint: Path | None  # the one to resume from
    bert: BertForMaskedLM  # what is saved
    model: nn.Module  # the same weights, taking packed rows, wrapped for the device
    optimizer: AcceleratedOptimizer
    divide: Divide  # chunks into micro-batches
    pace: Pace
    signals: list[int]  # that came since training began: Ctrl-C, SIGTERM

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def test_chunks(self) -> int:
        """How many chunks of the test text the first and the last evaluation score."""
        return min(len(self.data.test), self.config.max_test_chunks or len(self.data.test))

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.data.train) / self.config.batch_size)


@dataclass
class Unreported:
    """What was done since the last line in the log."""

    steps: int = 0
    seconds: float = 0.0
    loss: float = 0.0  # summed over masked tokens, of all ranks, in nats
    masked_tokens: int = 0
    tokens: int = 0


@dataclass
class Progress:
    """How far a run has come: with the weights and the optimizer's state, all that survives a kill."""

    step: int = 0  # optimizer steps done
    evaluated: int = -1  # the last step after which the model was evaluated; -1: not even the start was
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.csv
    unreported: Unreported = field(default_factory=Unreported)
    best_loss: float | None = None  # the lowest test loss in training, on the sampled chunks
    skipped: int = 0  # steps without a finite loss and gradient
    skipped_in_a_row: int = 0
    start: Evaluation | None = None  # of the starting checkpoint, which later ones are compared with
    sampled_chunks: int = 0  # of the test text, which evaluations between the first and the last score
    guesses_before: list[list[Guess]] = field(default_factory=list)  # the starting checkpoint's
    micro_batch_tokens: int | None = None  # what was found to fit a GPU's memory


class Ending(Enum):
    """Why a run ends."""

    FINISHED = "all steps are done"
    EVALUATED = "scored as it is"
    STOPPED = "a signal told it to stop"
    SKIPPING = "diverged: too many steps in a row had no finite loss and gradient"
    BROKEN = "diverged: weights are not finite"
