"""The devices of a run, as accelerate provides them, and the agreement of its ranks."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar
from warnings import filterwarnings

import torch
import transformers
from accelerate import Accelerator, utils
from accelerate.utils import gather_object

from Config import Config
from mlm.errors import UserError
from mlm.runtime import heartbeat
from mlm.runtime.hardware import DeviceSettings, check_devices, choose_precision
from mlm.storage import make_folder

Decision = TypeVar("Decision")
PREPARATION_TIMEOUT = timedelta(days=1)  # one machine may prepare its text for longer than another
TRAINING_TIMEOUT = timedelta(minutes=15)  # a checkpoint may have to go to a slow disk, or a model be compiled
SECONDS_TO_APPEAR = 10.0  # for a file that another machine has written to a network disk


def make_accelerator(config: DeviceSettings, tracker: str = "none", output: str | None = None) -> Accelerator:
    """Makes the accelerator of a run: its devices, its precision, and its tracker, which writes under `output`. Raises
    UserError where devices or precision are not available, or several processes share one device."""
    transformers.logging.set_verbosity_error()  # load_model gives these warnings in its own words
    transformers.logging.disable_progress_bar()
    filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)  # accelerate passes it on by its old name
    check_devices(config)
    precision = choose_precision(config)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    accelerator = Accelerator(
        mixed_precision="no" if precision == "tf32" else precision,  # float32 whose products round their inputs
        log_with=None if tracker == "none" else tracker,
        project_dir=output,
        kwargs_handlers=[
            utils.InitProcessGroupKwargs(timeout=PREPARATION_TIMEOUT),
            utils.DistributedDataParallelKwargs(
                broadcast_buffers=False,  # an encoder's never change
                gradient_as_bucket_view=True,  # spares a copy of all gradients
            ),
        ],
    )
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise UserError(
            "the launcher started several processes, and there is no GPU for them; to train on the CPU in several "
            "processes set ACCELERATE_USE_CPU=true"
        )
    return accelerator


def decide_on_main(accelerator: Accelerator, decide: Callable[[], Decision]) -> Decision:
    """Calls `decide` on the main rank, and returns its result on every rank. Where it raises UserError there, the other
    ranks exit with status 2."""
    decided = error = None
    if accelerator.is_main_process:
        try:
            decided = decide()
        except UserError as raised:
            error = raised
    decided, failed = utils.broadcast_object_list([decided, error is not None])
    if error:
        raise error
    if failed:
        sys.exit(2)
    return decided


def refuse_differences(recipe: dict[str, Any]) -> None:
    """Raises UserError where the machines do not have the same text, words and tokenizer, whatever the paths.

    recipe: of this rank, as `make_recipe` returns it.
    """
    digests = {name: value for name, value in recipe.items() if name != "settings"}
    if any(other != digests for other in gather_object([digests])):
        raise UserError(
            "path_datasets: text, words or tokenizer differ between the machines; each needs the same files"
        )


def refuse_separate_folders(accelerator: Accelerator, output: Path) -> None:
    """Raises UserError where `output`, whatever it is called there, is not one folder for the ranks of all machines."""
    if accelerator.num_processes == 1:
        return
    with ExitStack() as held:

        def leave_mark() -> str:
            make_folder(output)
            return held.enter_context(NamedTemporaryFile(prefix=".shared-", dir=output)).name

        mark = output / Path(decide_on_main(accelerator, leave_mark)).name  # a random name, so no other folder has it
        latest = time.monotonic() + SECONDS_TO_APPEAR
        while not mark.exists() and time.monotonic() < latest:
            time.sleep(0.2)
        is_found = gather_object([mark.exists()])
    if not all(is_found):
        raise UserError(
            f"path_model_save: {output} is not the same folder on all machines; put it on a disk that all of them see, "
            "as each resumes from what the first one saves"
        )


def watch_each_other(config: Config) -> None:
    """Makes a rank that is lost, hangs, or is silent for minutes, end the run from now on; before, it may have been
    preparing text."""
    _host_group()  # made here, so that hosts which cannot reach each other end the run before it trains
    torch.distributed.distributed_c10d._set_pg_timeout(TRAINING_TIMEOUT)
    heartbeat.start(config.path_model_save, config.compile)


def on_any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set on any rank. The hosts exchange it over gloo, so that no rank waits for its GPU."""
    if accelerator.num_processes == 1:
        return flag
    flags = torch.tensor([int(flag)])
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=_host_group())
    return bool(flags)


@cache
def _host_group():
    """Returns a process group of the hosts, which needs no GPU."""
    return torch.distributed.new_group(backend="gloo", timeout=TRAINING_TIMEOUT)
