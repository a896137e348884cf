"""The folder of a run: named, found again to be resumed, and claimed by one process at a time."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate import Accelerator
from filelock import Timeout

from Config import Config
from mlm.errors import UserError
from mlm.runtime.distributed import decide_on_main, refuse_separate_folders
from mlm.storage import atomic_write, lock, make_folder, write_json


@contextmanager
def run_folder(config: Config, accelerator: Accelerator) -> Iterator[Path]:
    """Yields the run's own folder, made or, to resume a run, found; one made is removed if training never began.

    A dry run has one that is removed at its end. Raises UserError where `run_name` is taken, another process is at work
    there, the folder cannot be made, or machines would not have it in common.
    """
    if config.dry_run:
        cache = Path(config.path_model_save) / ".cache"
        make_folder(cache)
        with TemporaryDirectory(prefix="dry-run-", dir=cache) as temporary:
            yield Path(temporary)
        return
    with ExitStack() as held:  # the lock, for as long as the run lasts
        refuse_separate_folders(accelerator, Path(config.path_model_save))
        folder, is_new = decide_on_main(accelerator, lambda: _claim(config, held))
        try:
            yield folder
        finally:
            if is_new and accelerator.is_main_process and not (folder / "metrics.csv").exists():
                shutil.rmtree(folder)


def _claim(config: Config, held: ExitStack) -> tuple[Path, bool]:
    """Finds a folder, locks it as long as `held` lasts, and makes it where it is new. Returns it, and whether it is."""
    for folder in [find_run(config)] if config.resume else _free_names(config):
        if config.check_only:
            break
        try:
            held.enter_context(lock(_lock_of(folder), timeout_s=0))
        except Timeout as error:
            if config.resume or config.run_name:
                raise UserError(f"run_name: another process is at work in {folder}") from error
            continue  # another process begins there in this very second
        except OSError as error:
            raise UserError(f"path_model_save: cannot make {folder}: {error.strerror}") from error
        if not folder.exists():  # with settings.json, by which it is known as a run's
            with atomic_write(folder) as temporary:
                temporary.mkdir()
                write_json(temporary / "settings.json", {"settings": asdict(config)})
            return folder, True
        break
    return folder, False


def _lock_of(folder):
    return folder.parent / ".cache" / f"{folder.name}.lock"


def is_at_work(folder: Path) -> bool:
    """Whether a process of this machine is at work in the folder of a run."""
    if not _lock_of(folder).exists():
        return False
    try:
        with lock(_lock_of(folder), timeout_s=0):
            return False
    except Timeout:
        return True


def _free_names(config: Config) -> Iterator[Path]:
    """Yields folders for a new run: `run_name`, or date, time and model, numbered where several begin in one second.
    Raises UserError where `run_name` is taken."""
    output = Path(config.path_model_save)
    if config.run_name:
        if (output / config.run_name).exists():
            taken = f"run_name: {output / config.run_name} exists already"
            raise UserError(f"{taken}; choose another name, or resume it by --resume")
        yield output / config.run_name
        return
    model = "demo" if config.demo else re.sub(r"[^\w.-]+", "-", Path(config.initial_pretrain_model).name)
    name = time.strftime(f"%Y-%m-%d_%H-%M-%S_{model}")
    for number in count(1):
        folder = output / (name if number == 1 else f"{name}-{number}")
        if not folder.exists():
            yield folder


def find_run(config: Config) -> Path:
    """Returns the folder of the run to resume: the one that `run_name` names, or the unfinished one that trained last;
    where all are finished, with a constant learning rate, the one that trained last, to be extended.

    If `run_name` names no folder yet, a new run begins there, so that one command serves to begin and to resume. Raises
    UserError where there is none to resume, or it is finished and can have no more steps.
    """
    output = Path(config.path_model_save)
    if config.run_name:
        folder = output / config.run_name
        if (folder / "final").exists() and _schedule_of(folder) != "constant":
            why = "As its learning rate fell to its end it cannot be extended; one with --schedule constant can be"
            raise UserError(f"resume: {folder} is finished; its model is {folder / 'final'}. {why}")
        if folder.exists() and not (folder / "settings.json").exists():
            raise UserError(f"resume: {folder} is not the folder of a run; choose another run_name")
        return folder
    runs = [path.parent for path in output.glob("*/settings.json") if _schedule_of(path.parent)]
    unfinished = [run for run in runs if not (run / "final").exists()]
    if not unfinished and config.schedule == "constant":
        unfinished = [run for run in runs if _schedule_of(run) == "constant"]
    if not unfinished:
        raise UserError(f"resume: {output} holds no unfinished run; leave --resume out to begin one")
    return max(unfinished, key=_trained_at)


def _schedule_of(folder: Path) -> str | None:
    """Returns how a run's learning rate goes, None where its settings.json is of no training or another program's."""
    try:
        saved = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["settings"]
        return None if saved.get("evaluate_only") else saved.get("schedule", "linear")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _trained_at(folder: Path) -> float:
    """Returns when training last wrote to a run's folder; whoever draws its page anew changes the folder, too."""
    written = [folder / "settings.json", folder / "metrics.csv", *folder.glob("checkpoints/step-*")]
    return max(path.stat().st_mtime for path in written if path.exists())
