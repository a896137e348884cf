"""Work that processes share over a folder that all of them see, on one machine or on many.

There is no queue, no lock and no message: the result of a task is a file or a folder, written aside and renamed when it
is whole. Each process goes through all tasks, its own first, and does what is not done yet. So one that dies leaves its
tasks to the others, one that comes late helps, and what was done before a kill is not done again. Two that do the same
task at the same time write the same bytes.
"""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from threading import Thread
from typing import IO
from uuid import uuid4

import psutil
from tqdm import tqdm

from mlm.errors import UserError, plain_errors
from mlm.storage import sizes, write_beside_others
from mlm.terminal import progress_bar, say

ROOT = Path(__file__).parent.parent.parent
BYTES_WORTH_A_HELPER = 1 << 25  # of text: less is prepared before another process has begun
HELPER_MEMORY_BYTES = 1 << 30  # left free for each: about twice what one takes
SIZES = ".sizes.json"  # of the files of a finished folder
UNFINISHED = "unfinished"  # folder of what is not whole yet, beside those of results


@dataclass
class Place:
    """A process among those that share work: where in the list of tasks it begins."""

    number: int = 0
    places: int = 1
    watch: Callable[[str, int, int], None] = lambda what, done_bytes, all_bytes: None  # is told how far all have come


def do_all(what: str, folder: Path, task_bytes: Sequence[int], do: Callable[[int, Path], None], place: Place) -> None:
    """Does what no process has done yet of tasks 0, 1, ..., of so many bytes each. do(task, path) writes the result,
    which becomes `folder / str(task)`; afterwards all results are there."""
    tasks = range(len(task_bytes))
    others = [task for task in tasks if task % place.places != place.number]
    random.Random(place.number).shuffle(others)  # so that few take the same one of those that a dead process left
    folder.mkdir(parents=True, exist_ok=True)
    done, all_bytes = set[int](), sum(task_bytes)
    for task in [*tasks[place.number :: place.places], *others]:
        if not (folder / str(task)).exists():
            with write_beside_others(folder / str(task), folder.parent / UNFINISHED) as temporary:
                do(task, temporary)
            done.update(int(path.name) for path in folder.glob("[0-9]*"))
        done.add(task)
        place.watch(what, sum(task_bytes[index] for index in done), all_bytes)


def build_together(path: Path, text_bytes: int, work: Callable[[Path, Place], None]) -> Path:
    """Builds a folder from a text of so many bytes, unless it is there: with helpers on this machine, and with all
    other processes that ask for the same. Returns it.

    work(folder, place): writes `folder / "whole"`, which becomes the folder, and whatever else it needs beside that; a
    function that can be pickled. It is done again if a file is missing or of another size. Raises UserError.
    """
    while not _is_complete(path):
        parts = path.with_name(f".{path.name}.parts")
        if path.exists() and not _is_complete(path):  # damaged
            damaged = path.rename(path.with_name(f".{path.name}.{uuid4().hex}.old"))
            shutil.rmtree(damaged, ignore_errors=True)
        try:
            _share(work, parts, text_bytes)
            whole = parts / "whole"
            with write_beside_others(whole / SIZES, parts / UNFINISHED) as temporary:
                temporary.write_text(json.dumps(_sizes(whole)))
            whole.rename(path)
        except Exception as error:  # whatever comes of it where another process, done earlier, has removed the parts
            is_overtaken = _is_complete(path)
            if isinstance(error, UserError) and not is_overtaken and rank_and_ranks()[1] == 1:
                shutil.rmtree(parts, ignore_errors=True)  # else others may still be at work on the same
            if not is_overtaken:
                raise
        shutil.rmtree(parts, ignore_errors=True)
    return path


def _is_complete(path: Path) -> bool:
    try:
        return _sizes(path) == json.loads((path / SIZES).read_text())
    except (OSError, ValueError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    return {name: size for name, size in sizes(folder).items() if name != SIZES}


# ------------------------------------------------------------------------------------------- processes of this machine


def rank_and_ranks() -> tuple[int, int]:
    """Returns this process's number and how many there are: the launcher's, or Slurm's where there is no launcher. It
    may be wrong, as where a batch script starts one process: that decides no more than where each begins."""
    for rank, ranks in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and ranks in os.environ:
            return int(os.environ[rank]), int(os.environ[ranks])
    return 0, 1


def count_helpers(text_bytes: int) -> int:
    """Returns how many processes are to help this one with a text, so that each has a core and enough memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    of_this_rank = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    in_memory = psutil.virtual_memory().available // HELPER_MEMORY_BYTES
    return max(0, min(of_this_rank - 1, in_memory, text_bytes // BYTES_WORTH_A_HELPER))


def _share(work: Callable[[Path, Place], None], folder: Path, text_bytes: int) -> None:
    """Calls `work` in this process, and in helpers beside it as long as it takes."""
    rank, ranks = rank_and_ranks()
    helpers = count_helpers(text_bytes)
    first, places = rank * (1 + helpers), ranks * (1 + helpers)
    places_of_helpers = [Place(first + 1 + number, places) for number in range(helpers)]
    bars: dict[str, tqdm] = {}

    def watch(what: str, done_bytes: int, all_bytes: int) -> None:
        check()
        if what not in bars:
            close_bars()
            bars[what] = progress_bar(what, all_bytes, "B", shown=rank == 0, done=done_bytes)
        bars[what].update(done_bytes - bars[what].n)

    def close_bars() -> None:
        for bar in bars.values():
            bar.close()

    with _one_thread(helpers + ranks > 1), _helpers(work, folder, places_of_helpers) as check:
        try:
            work(folder, Place(first, places, watch))
        finally:
            close_bars()


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """Has the tokenizers library use one thread in this process while the block runs, if wanted: where other processes
    are at work each has a core of its own."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    if wanted:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if wanted:
            os.environ.pop(name)
            os.environ |= {name: before} if before is not None else {}


@contextmanager
def _helpers(work: Callable[[Path, Place], None], folder: Path, places: list[Place]) -> Iterator[Callable[[], None]]:
    """Runs work(folder, place) in a process for each place while the block runs. Yields a function that raises
    UserError where one of them has, and says so where one has died."""
    started: list[tuple[subprocess.Popen, IO]] = []
    single = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

    def check() -> None:
        for process, said in list(started):
            status = process.poll()
            if status == 2:
                said.seek(0)
                raise UserError(said.read().decode().strip().removeprefix("error: "))
            if status:
                started.remove((process, said))
                say(f"a process that prepared text ended with status {status}; the others do its part")

    try:
        for place in places:
            errors: IO = TemporaryFile()  # noqa: SIM115  closed below
            command = [sys.executable, "-m", "mlm.runtime.together"]
            environment = os.environ | single | {"PYTHONPATH": search}
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=errors, env=environment)
            started.append((process, errors))
            assert process.stdin
            pickle.dump((work, folder, place.number, place.places), process.stdin)
            process.stdin.flush()  # and it stays open: a helper ends when this process does
        yield check
    finally:
        for process, said in started:
            process.kill()
            process.wait()
            said.close()


def _help() -> None:
    """Does the work that the process which started this one sends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for that process, which ends this one
    work, folder, number, places = pickle.load(sys.stdin.buffer)
    Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()  # at its end there is nothing to read
    with plain_errors():
        work(folder, Place(number, places))


if __name__ == "__main__":
    _help()
