"""The devices of a run as accelerate gives them, and what their ranks agree on before training."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar
from warnings import filterwarnings

import transformers
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)

from Config import Config
from mlm.errors import UserError
from mlm.machine import check_devices, choose_precision

Decision = TypeVar("Decision")


def make_accelerator(config: Config) -> Accelerator:
    """The devices, number format and tracker of a run.

    Raises UserError where the tracker, the devices or the format cannot be had, or several processes share one device.
    """
    tracker = None if config.tracker == "none" else config.tracker
    if tracker and tracker not in map(str, get_available_trackers()):
        raise UserError(f"tracker: {tracker} is not installed, or not one that accelerate knows")
    check_devices(config)
    accelerator = Accelerator(
        mixed_precision=choose_precision(config),
        log_with=tracker,
        project_dir=config.path_model_save,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(days=1)),  # one machine may prepare its text longer than another
            DistributedDataParallelKwargs(broadcast_buffers=False),  # BERT's never change
        ],
    )
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise UserError(
            "the launcher started several processes, and there is no GPU for them; to train on the CPU in several "
            "processes set ACCELERATE_USE_CPU=true"
        )
    return accelerator


def quiet_libraries() -> None:
    """Keeps the libraries from saying what this program says itself, in its own words."""
    transformers.logging.set_verbosity_error()  # what it would warn of is said by load_model
    transformers.logging.disable_progress_bar()
    filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)  # accelerate passes it on by its old name


def decide_on_main(accelerator: Accelerator, decide: Callable[[], Decision]) -> Decision:
    """What `decide` returns on the main rank, on every rank.

    Where it raises UserError there, the other ranks exit with status 2.
    """
    decided = error = None
    if accelerator.is_main_process:
        try:
            decided = decide()
        except UserError as raised:
            error = raised
    decided, failed = broadcast_object_list([decided, error is not None])
    if error:
        raise error
    if failed:
        sys.exit(2)
    return decided


def refuse_differences(recipe: dict[str, Any]) -> None:
    """Raises UserError where the machines do not have the same text, words and tokenizer."""
    if any(other != recipe for other in gather_object([recipe])):
        raise UserError(
            "path_datasets: text, words or tokenizer differ between the machines; each needs the same files"
        )
