"""What is built once for a run and kept to its end: what is fixed, what learns, and the text; and how a run may end."""

from dataclasses import dataclass, field
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import PreTrainedModel

from Config import Config
from mlm.data.chunks import Corpus
from mlm.data.micro_batches import MicroBatcher
from mlm.evaluation.fill_mask import HiddenWord
from mlm.runtime import heartbeat
from mlm.runtime.signals import StopRequest
from mlm.training.plan import Plan, Timings


@dataclass(frozen=True)
class Setup:
    """What is fixed before the first step."""

    config: Config  # each setting with the value that it stands for
    plan: Plan  # which an early stop replaces
    folder: Path
    resumed: Path | None  # the checkpoint to resume from
    recipe: dict[str, Any]  # all that decides the training
    derived: dict[str, Any]  # numbers that follow from settings, text and machine, by name, to be shown
    command: str  # that repeats the run


@dataclass
class Learner:
    """What learns, on its device."""

    accelerator: Accelerator
    bert: PreTrainedModel  # what is saved
    model: nn.Module  # the same weights, taking packed rows, wrapped for the device
    optimizer: AcceleratedOptimizer
    micro_batcher: MicroBatcher

    @property
    def place(self) -> tuple[int, int]:
        """This rank, and how many there are."""
        return self.accelerator.process_index, self.accelerator.num_processes

    def shut_down(self) -> None:
        """Ends the ranks together: a launcher that sees one end badly ends the others, even while the main one saves.

        The model goes first: the process group must not end inside DistributedDataParallel's reducer, which would wait
        for a thread of the group that waits for this one, and a rank would hang now and then.
        """
        del self.model, self.optimizer
        self.accelerator.wait_for_everyone()
        heartbeat.stop()
        self.accelerator.free_memory()
        self.accelerator.end_training()


@dataclass
class Run:
    """A run, as train.py carries it; what stands below takes the parts that it uses."""

    setup: Setup
    corpus: Corpus
    learner: Learner
    timings: Timings
    stop: StopRequest = field(default_factory=StopRequest)
    hidden_words: list[HiddenWord] = field(default_factory=list)  # of the test text, for the guesses before and after

    @property
    def is_main(self) -> bool:
        return self.learner.accelerator.is_main_process


def derive_numbers(accelerator: Accelerator, bert: PreTrainedModel, corpus: Corpus, plan: Plan) -> dict[str, Any]:
    """Returns numbers that follow from settings, text and machine, by name, to be shown."""
    replayed = {"general_chunks_per_step": plan.general_chunks} if plan.general_chunks else {}
    return replayed | {
        "devices": f"{accelerator.num_processes} x {accelerator.device.type}",
        "family": bert.config.model_type,
        "mask_token": corpus.tokenizer.mask_token,
        "vocabulary": corpus.vocabulary.size,
        "parameters": sum(parameter.numel() for parameter in bert.parameters()),
        "added_words": len(corpus.added_words),
        "chunks": len(corpus.train),
        "steps_per_epoch": plan.steps_per_epoch,
        "tokens_per_step": plan.tokens_per_step,
        "positions_per_step": plan.positions_per_step,
    }


def library_versions() -> dict[str, str]:
    """Returns the versions of the libraries that the training's bits depend on."""
    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "datasets", "accelerate", "numpy")}


class Ending(Enum):
    """Why a run ends."""

    FINISHED = "all steps are done"
    EVALUATED = "scored as it is"
    STOPPED = "a signal told it to stop"
    SKIPPING = "diverged: too many steps in a row had no finite loss and gradient"
    BROKEN = "diverged: weights are not finite"
    # What a reader of its folder finds, and no run says:
    INTERRUPTED = "no process of this machine is at work on it; --resume goes on"
