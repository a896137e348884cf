"""How a run starts and is stopped: the accelerator, signals, what several ranks agree on, errors told plainly."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar
from warnings import filterwarnings

import torch
import transformers
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch.distributed import DistBackendError

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


# --------------------------------------------------------------------------------------------- what the ranks agree on


def decide_on_main(accelerator: Accelerator, decide: Callable[[], Decision]) -> Decision:
    """What `decide` returns on the main rank, on every rank. Where it raises UserError there, the others just exit."""
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


# ------------------------------------------------------------------------------------------------------------- signals


def catch_signals(received: list[int], speak: bool) -> None:
    """Turns Ctrl-C and SIGTERM from now on into entries of the list `received`. A second Ctrl-C exits at once.

    A second SIGTERM does not: launchers and schedulers each send one to every rank.
    """

    def note(number, frame):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if number == signal.SIGINT:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if speak and not received:  # by os.write, as a print cannot interrupt a print
            os.write(2, b"\nfinishing the step and saving; a second Ctrl-C exits at once\n")
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)


# -------------------------------------------------------------------------------------------------------------- errors


def quiet_libraries() -> None:
    """Keeps the libraries from saying what this program says itself, in its own words."""
    transformers.logging.set_verbosity_error()  # what it would warn of is said by load_model
    transformers.logging.disable_progress_bar()
    filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)  # accelerate passes it on by its old name


@contextmanager
def plain_endings(config: Config) -> Iterator[None]:
    """Ends the process in plain words where a signal comes before training, or memory, compiler or network fail.

    Raises UserError for what the user can put right, and SystemExit for the rest.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped; nothing was trained yet that could be lost", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        raise UserError(f"micro_batch_tokens, sen_max_length: out of memory; lower ones need less. {error}") from error
    except RuntimeError as error:
        if config.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            reason = " ".join(str(error).splitlines()[:2])
            raise UserError(f"compile: the model cannot be compiled here; leave it out. {reason}") from error
        if not (isinstance(error, DistBackendError) or "gloo" in str(error)):
            raise
        print(
            f"error: rank {os.environ.get('RANK', 0)} lost touch with another rank, which may have said why above. "
            f"The same command with --resume goes on from the newest checkpoint in {config.path_model_save}",
            file=sys.stderr,
        )
        sys.exit(1)
