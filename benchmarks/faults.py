"""Breaks real runs on purpose, resumes them, and compares what they end with against a run that nothing happened to.

    python benchmarks/faults.py --faults 200 --seed 1

Prints a table of what was tried and what was lost. A run is *lost* if it cannot be resumed, or anything but the words
meant for the user was said; *changed* if it ends with other weights, or with a gap or a repetition in metrics.csv. The
seed repeats the campaign's choices; the exact moment of a kill is the machine's. For Linux; a disk that is full or
read-only is tried where a file system may be mounted, by root.
"""

import argparse
import csv
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import data_process
import train
from Config import Config
from mlm.errors import plain_errors
from mlm.training import step as training_step

ROOT = Path(__file__).parent.parent
STEPS = 36  # of a run; a kill may fall into any of them
KILLED, STOPPED, REFUSED = -signal.SIGKILL, 143, 2  # statuses
MIB, DISK = 1 << 20, "size=100m"
FILE_SIZES = (MIB // 32, 4 * MIB)  # more than the log's, up to the optimizer's


def settings(folder: Path) -> Config:
    """A run of seconds in which reports, evaluations, checkpoints and epochs end at different steps."""
    return Config(
        initial_pretrain_model="scratch:tiny", initial_pretrain_tokenizer="corpus", vocab_size=300,
        path_datasets=str(folder / "text"), path_model_save=str(folder / "output"), run_name="run", resume=True,
        mixed_precision="no", batch_size=8, sen_max_length=32, max_steps=STEPS, log_every=3, eval_every=8, save_every=5,
        tracker="none",
    )  # fmt: skip


def write_text(folder: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 8))) for _ in range(300)]
    (folder / "text").mkdir(parents=True)
    for name, number in (("train", 100), ("test", 30)):
        lines = "".join(" ".join(draw.choices(words, k=draw.randint(1, 20))) + "\n" for _ in range(number))
        (folder / "text" / f"{name}.txt").write_text(lines, encoding="utf-8")


# --------------------------------------------------------------------------------------------------- one process


def launch(
    folder: Path, arm: Callable[[], None] | None = None, strike: Callable[[int], None] | None = None, after_s: float = 0
) -> tuple[int, str]:
    """Trains in a process of its own, forked from this one, which has all imported; its status and output.

    arm is called in it before it trains; strike, with its id, here after so many seconds. A status below 0 is a signal.
    """
    log = folder / "log"
    process = os.fork()
    if not process:
        opened, status = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 1
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        try:
            torch.set_num_threads(1)
            if arm:
                arm()
            with plain_errors():
                train.main(settings(folder))
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    if strike:
        time.sleep(after_s)
        strike(process)  # even if it has ended, as nobody has waited for it yet
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8", errors="replace")


def send(kind: int) -> Callable[[int], None]:
    return lambda process: os.kill(process, kind)


def at_call(module: object, name: str, number: int, kind: int) -> None:
    """Has this process send itself a signal at the given call of a function."""
    function, calls = getattr(module, name), []

    def counted(*arguments):
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), kind)
        return function(*arguments)

    setattr(module, name, counted)


def at_change_of_disk(output: Path, number: int) -> None:
    """Kills this process before it opens for writing, renames, makes or removes something, for the given time."""
    seen = []

    def watch(event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")) and str(output) in str(arguments[0]):
            seen.append(None)
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def limit_files(size: int, deadly: bool) -> None:
    """Lets this process write no file beyond `size` bytes: it dies within the file, or the writing fails."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# ----------------------------------------------------------------------------------------------------- the faults
# Each breaks the run in `folder`, whose undisturbed length in seconds it is given, and returns what went wrong that
# should not have; or raises Unharmed.


class Unharmed(Exception):
    """The run ended, or had nothing to break, before the fault could strike."""


def check(status: int, output: str, *expected: int, words: str = "") -> list[str]:
    """What was not as it should be about a broken run."""
    if status == 0:
        raise Unharmed
    problems = [] if status in expected else [f"status {status}, not {expected}"]
    problems += ["a traceback"] if "Traceback" in output else []
    problems += [] if words in output else [f"nothing about {words!r}"]
    return [*problems, output] if problems else []


def kill_any_moment(folder: Path, draw: random.Random, seconds: float) -> list[str]:
    return check(*launch(folder, strike=send(signal.SIGKILL), after_s=draw.uniform(0, seconds)), KILLED)


def stop_any_moment(folder: Path, draw: random.Random, seconds: float) -> list[str]:
    stopped = launch(folder, strike=send(signal.SIGTERM), after_s=draw.uniform(0, seconds))
    return check(*stopped, STOPPED, -signal.SIGTERM)  # the second where Python had not yet begun to train


def kill_in_step(folder: Path, draw: random.Random, seconds: float) -> list[str]:
    arm = partial(at_call, training_step, "accumulate_gradients", draw.randint(1, STEPS), signal.SIGKILL)
    return check(*launch(folder, arm), KILLED)


def stop_in_step(folder: Path, draw: random.Random, seconds: float) -> list[str]:
    arm = partial(at_call, training_step, "accumulate_gradients", draw.randint(1, STEPS), signal.SIGTERM)
    return check(*launch(folder, arm), STOPPED, words="stopped after step")


def kill_in_evaluation(folder: Path, draw: random.Random, seconds: float) -> list[str]:
    arm = partial(at_call, data_process, "content_keys", draw.randint(1, 5), signal.SIGKILL)
    return check(*launch(folder, arm), KILLED)


def stop_in_evaluation(folder: Path, draw: random.Random, seconds: float) -> list[str]:
    arm = partial(at_call, data_process, "content_keys", draw.randint(1, 5), signal.SIGTERM)
    return check(*launch(folder, arm), STOPPED, words="stopped after step")


def kill_between_files(folder: Path, draw: random.Random, seconds: float) -> list[str]:
    """In a save of a checkpoint, of best/ or final/, or of metrics.csv."""
    return check(*launch(folder, partial(at_change_of_disk, folder / "output" / "run", draw.randint(1, 200))), KILLED)


def kill_inside_file(folder: Path, draw: random.Random, seconds: float) -> list[str]:
    arm = partial(limit_files, draw.randint(*FILE_SIZES), deadly=True)
    return check(*launch(folder, arm), -signal.SIGXFSZ)


def file_too_large(folder: Path, draw: random.Random, seconds: float) -> list[str]:
    arm = partial(limit_files, draw.randint(*FILE_SIZES), deadly=False)
    return check(*launch(folder, arm), REFUSED, words="error: ")


def kill_in_preparation(folder: Path, draw: random.Random, seconds: float) -> list[str]:
    cache = folder / "output" / ".cache"
    shutil.rmtree(cache, ignore_errors=True)
    return check(*launch(folder, partial(at_change_of_disk, cache, draw.randint(1, 30))), KILLED)


def damage_cache(folder: Path, draw: random.Random, seconds: float) -> list[str]:
    cache = folder / "output" / ".cache"
    files = sorted(path for path in cache.rglob("*") if path.is_file() and path.stat().st_size)
    if not files:
        raise Unharmed
    damage(draw.choice(files), draw, ["cut", "missing"])
    return check(*launch(folder, partial(at_call, training_step, "accumulate_gradients", 1, signal.SIGKILL)), KILLED)


def damage_checkpoint(folder: Path, draw: random.Random, seconds: float) -> list[str]:
    checkpoints = sorted((folder / "output" / "run" / "checkpoints").glob("step-*"))
    if len(checkpoints) < 2:
        raise Unharmed
    file = draw.choice(sorted(checkpoints[-1].iterdir()))
    damage(file, draw, ["cut", "missing", "a bit flipped"])
    arm = partial(at_call, training_step, "accumulate_gradients", 1, signal.SIGKILL)
    return check(*launch(folder, arm), KILLED, words=f"warning: {checkpoints[-1]} is skipped")


def damage(file: Path, draw: random.Random, ways: list[str]) -> None:
    content, way = bytearray(file.read_bytes()), draw.choice(ways)
    if way == "cut":
        file.write_bytes(content[: draw.randrange(len(content))])
    elif way == "missing":
        file.unlink()
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)


def fill_disk(folder: Path, draw: random.Random, seconds: float) -> list[str]:
    disk = folder / "disk"
    mount("-o", f"remount,size={shutil.disk_usage(disk).used + draw.randint(0, 12 * MIB)}", disk)
    try:
        return check(*launch(folder), REFUSED, words="error: ")
    finally:
        mount("-o", f"remount,{DISK}", disk)


def forbid_writing(folder: Path, draw: random.Random, seconds: float) -> list[str]:
    output = folder / "output"

    def strike(process):  # where files are open a disk cannot be remounted, but the same be mounted on top
        mount("--bind", folder / "sealed", output)

    try:
        return check(*launch(folder, strike=strike, after_s=draw.uniform(0, seconds)), REFUSED, words="error: ")
    finally:
        subprocess.run(["umount", "--lazy", output], check=True)


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


FAULTS = {
    "kill -9 at any moment": kill_any_moment,
    "kill -9 in a step": kill_in_step,
    "kill -9 in an evaluation": kill_in_evaluation,
    "kill -9 in a save, between files": kill_between_files,
    "killed in a save, inside a file": kill_inside_file,
    "kill -9 in the preparation": kill_in_preparation,
    "SIGTERM at any moment": stop_any_moment,
    "SIGTERM in a step": stop_in_step,
    "SIGTERM in an evaluation": stop_in_evaluation,
    "a file size limit is hit": file_too_large,
    "a checkpoint is damaged": damage_checkpoint,
    "the cache is damaged": damage_cache,
}
ON_OWN_DISK = {"the disk fills up": fill_disk, "the disk turns read-only": forbid_writing}
RANK = "kill -9 of one of two ranks"


@contextmanager
def own_disk(folder: Path) -> Iterator[bool]:
    """Gives the run in `folder` a disk of its own, and `sealed` to read it; says whether that is allowed here."""
    disk, output, sealed = (folder / name for name in ("disk", "output", "sealed"))
    for place in (disk, output, sealed):
        place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", DISK, "tmpfs", disk]
    if os.geteuid() or subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        yield False
        return
    mount("--bind", disk, output)
    mount("--bind", disk, sealed)
    mount("-o", "remount,bind,ro", sealed)
    try:
        yield True
    finally:
        subprocess.run(["umount", "--lazy", sealed, output, disk], check=True)


# ---------------------------------------------------------------------------------------------------- the campaign


def remains(folder: Path) -> tuple[bytes, bytes, list[str]]:
    """What has to be the same: the final and the best weights, and metrics.csv without its column of speeds."""
    run = folder / "output" / "run"
    with open(run / "metrics.csv", newline="") as file:
        rows = [str(row | {"tokens_per_s": ""}) for row in csv.DictReader(file)]
    return *((run / name / "model.safetensors").read_bytes() for name in ("final", "best")), rows


def is_finished(folder: Path) -> bool:
    return (folder / "output" / "run" / "final").exists()


def finish(folder: Path) -> list[str]:
    """Resumes the run for the last time; what went wrong."""
    if is_finished(folder):
        return []
    status, output = launch(folder)
    return [f"cannot be resumed: status {status}", output] if status or "Traceback" in output else []


def two_ranks(folder: Path, kill_after: int | None = None) -> int:
    """The run on two ranks, by torchrun, of which one is killed when a row after that step is logged; the status."""
    given = {name: value for name, value in vars(settings(folder)).items() if value not in (None, False, "")}
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "train.py", *flags]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
        for line in process.stdout:
            words = line.replace("/", " ").split()
            if kill_after is not None and words[:1] == ["step"] and int(words[1]) > kill_after:
                ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                os.kill(int(ranks[kill_after % 2]), signal.SIGKILL)
                kill_after = None
        return process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--rank-faults", type=int, default=10, help="of them on two ranks, which take longer")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"}
    draw = random.Random(given.seed)
    names = ("torch", "transformers", "accelerate")
    versions = [f"{name} {version(name)}" for name in names]
    print(platform.platform(), *versions, f"seed {given.seed}", sep=", ", flush=True)
    tried, lost, changed = Counter(), Counter(), Counter()

    def report(folder, faults, problems, expected):
        if not problems and remains(folder) != expected:
            problems = ["changed"]
            changed.update(faults)
        elif problems:
            lost[faults[-1]] += 1
        if problems:
            print(f"{folder.name}: {', '.join(faults)}", *problems, sep="\n", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        reference = Path(scratch) / "reference"
        write_text(reference)
        began = time.perf_counter()
        problems = finish(reference)
        seconds, expected = time.perf_counter() - began, remains(reference)
        assert not problems, problems
        while tried.total() < given.faults - given.rank_faults:
            folder = Path(scratch) / f"run-{tried.total()}"
            write_text(folder)
            with own_disk(folder) as allowed:
                kinds, faults, problems = FAULTS | (ON_OWN_DISK if allowed else {}), [], []
                for kind in draw.choices(list(kinds), k=draw.randint(1, 8)):
                    try:
                        problems += kinds[kind](folder, draw, seconds)
                        faults.append(kind)
                        tried[kind] += 1
                    except Unharmed:
                        pass
                    if problems or is_finished(folder):
                        break
                report(folder, faults, problems + finish(folder), expected)
            shutil.rmtree(folder)
        if given.rank_faults:
            reference = Path(scratch) / "two"
            write_text(reference)
            assert two_ranks(reference) == 0
        while tried[RANK] < given.rank_faults:
            folder = Path(scratch) / f"two-{tried[RANK]}"
            write_text(folder)
            tried[RANK] += 1
            problems = [] if two_ranks(folder, kill_after=draw.randrange(STEPS - 6)) else ["ended as if unharmed"]
            if two_ranks(folder):
                problems.append((folder / "log").read_text())
            report(folder, [RANK], problems, remains(reference))

    print("\n| what happened | times | runs lost | results changed |\n| --- | ---: | ---: | ---: |")
    for kind in sorted(tried):
        print(f"| {kind} | {tried[kind]} | {lost[kind]} | {changed[kind]} |")
    print(f"| all | {tried.total()} | {lost.total()} | {changed.total()} |")
    sys.exit(bool(lost or changed))


if __name__ == "__main__":
    main()
