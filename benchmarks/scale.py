"""Large text and many ranks: text prepared by several processes and through kills, the order of a billion chunks, and
the work of one rank among many.

    python benchmarks/scale.py prepare --gigabytes 2 --workers 1 2 3 --kills 10
    python benchmarks/scale.py ranks

The text is the documentation inside this Python, repeated with one word in twelve changed. Every measurement of the
preparation is a run of processes of its own; memory is the peak of resident memory of any of them, imports included.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

CHUNKS_A_RANK, LENGTH = 64, 126  # tokens of a chunk


def write_text(folder: Path, gigabytes: float) -> None:
    """train.txt of so many GB, and test.txt."""
    from mlm.text.demo import write_corpus

    write_corpus(folder)
    words = np.array((folder / "train.txt").read_text(encoding="utf-8").split(" "), dtype=object)
    inner = np.flatnonzero(["\n" not in word for word in words])  # the others end a line and begin one
    draw = np.random.default_rng(0)
    with open(folder / "train.txt", "w", encoding="utf-8", newline="\n") as file:
        while file.tell() < gigabytes * 1e9:
            changed = words.copy()
            places = draw.choice(inner, len(words) // 12)
            changed[places] = words[draw.choice(inner, len(places))]
            file.write(" ".join(changed))


# --------------------------------------------------------------------------------------------------------- preparation


def prepare_once(text: Path, output: Path, tokenizer: Path, workers: int) -> dict[str, float]:
    """Prepares the text as train.py does, in so many processes: seconds, and the peaks of resident memory."""
    from transformers import AutoTokenizer

    from Config import Config
    from data_process import prepare
    from mlm.data.tokenizer import read_vocabulary
    from mlm.runtime import together
    from mlm.text.files import find_text

    together.count_helpers = lambda text_bytes: workers - 1
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    config = Config(path_datasets=str(text), path_model_save=str(output))
    began = time.perf_counter()
    prepare(config, find_text(config), loaded, read_vocabulary(loaded))
    seconds = time.perf_counter() - began
    peaks = {
        name: resource.getrusage(who).ru_maxrss / 1024
        for name, who in (("mib", resource.RUSAGE_SELF), ("helper_mib", resource.RUSAGE_CHILDREN))
    }
    return {"seconds": seconds} | peaks


def digest_of(output: Path) -> str:
    """Of all that was made of the text."""
    content = hashlib.sha256()
    [folder] = output.glob(".cache/text-*")
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(file, "rb") as opened:
            content.update(hashlib.file_digest(opened, "sha256").digest())
    return content.hexdigest()[:16]


def start(text: Path, output: Path, tokenizer: Path, workers: int) -> subprocess.Popen:
    command = [sys.executable, __file__, "one", text, output, tokenizer, workers]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True, start_new_session=True)


def measure_preparation(given: argparse.Namespace, scratch: Path) -> None:
    from mlm.data.tokenizer import learn_tokenizer
    from mlm.text.lines import read_lines

    text, tokenizer = given.text or scratch / "text", scratch / "tokenizer"
    if not given.text:
        write_text(text, given.gigabytes)
    size = sum(file.stat().st_size for file in text.glob("*.txt"))
    learn_tokenizer(lambda: islice(read_lines([text / "train.txt"]), 20_000), 30522).save_pretrained(tokenizer)
    print(f"{size / 1e9:.2f} GB\n\n| workers | s | MB/s | peak MiB of the first, of a helper | bytes |", flush=True)
    print("| ---: | ---: | ---: | --- | --- |", flush=True)
    seconds = {}
    for workers in given.workers:
        output = scratch / f"output{workers}"
        said, _ = start(text, output, tokenizer, workers).communicate()
        found = json.loads(said.splitlines()[-1])
        seconds[workers] = found["seconds"]
        memory = f"{found['mib']:,.0f}, {found['helper_mib']:,.0f}"
        speed = size / 1e6 / found["seconds"]
        print(f"| {workers} | {found['seconds']:,.0f} | {speed:.2f} | {memory} | {digest_of(output)} |", flush=True)
    if given.kills:
        kill_and_finish(given, text, tokenizer, scratch / "killed", seconds[given.workers[-1]])


def kill_and_finish(given: argparse.Namespace, text: Path, tokenizer: Path, output: Path, usual_s: float) -> None:
    """Kills a preparation so many times, all its processes or the first one alone; then lets it end."""
    draw, began = random.Random(0), time.perf_counter()
    for number in range(given.kills):
        process = start(text, output, tokenizer, given.workers[-1])
        time.sleep(draw.uniform(5, 5 + usual_s / given.kills))
        if process.poll() is not None:
            sys.exit("it ended before it was killed")
        if number % 2:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
    start(text, output, tokenizer, given.workers[-1]).communicate()
    seconds = time.perf_counter() - began
    print(f"killed {given.kills} times: {seconds:,.0f} s in all, bytes {digest_of(output)}", flush=True)


# --------------------------------------------------------------------------------------------------------------- ranks


class Multiples:
    """Offsets of chunks of equal length, as an array that is not there."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        return LENGTH * indices


def measure_ranks() -> None:
    from data_process import training_batches
    from mlm.data.chunks import Chunks
    from mlm.data.masking import BERT_RULE
    from mlm.data.tokenizer import Vocabulary
    from mlm.randomness import epoch_order

    never = np.zeros(30522, dtype=bool)
    vocabulary = Vocabulary(101, 102, 0, 100, 103, 1, np.arange(999, 30522), ~never, never, never)

    def stand_in(chunks: int) -> Chunks:
        tokens = np.broadcast_to(np.uint16(2000), LENGTH * chunks)
        return Chunks(tokens, Multiples(chunks + 1), np.broadcast_to(np.uint64(0), chunks))

    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    epoch_order(42, 0, 10**9, np.arange(256))
    order_ms = 1e3 * (time.perf_counter() - began)
    began = time.perf_counter()
    next(training_batches(stand_in(10**9), vocabulary, BERT_RULE, 42, 256))
    step_ms = 1e3 * (time.perf_counter() - began)
    mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
    print(
        f"a billion chunks: the first 256 of an epoch in {order_ms:.2f} ms, and masked with those of the steps behind"
    )
    print(f"them in {step_ms:.1f} ms; {mib:.0f} MiB more than the imports took\n")

    places, blocks = np.arange(1 << 14), 61
    nanoseconds = []
    for _ in range(5):
        began = time.perf_counter()
        for block in range(blocks):
            epoch_order(42, 0, 10**6, places % 10**6 if block < blocks else places)
        nanoseconds.append(1e9 * (time.perf_counter() - began) / blocks / len(places))
    began = time.perf_counter()
    np.argsort(np.random.default_rng(0).integers(0, 1 << 63, 10**6), kind="stable")
    argsort = 1e9 * (time.perf_counter() - began) / 1e6
    print(
        f"a million chunks: {statistics.median(nanoseconds):.0f} ns each; sorted as random keys {argsort:.0f} ns each\n"
    )

    print(f"| ranks, of {CHUNKS_A_RANK} chunks of {LENGTH} tokens each | ms a step on one of them |\n| ---: | ---: |")
    for ranks in (1, 8, 64, 512):
        batch = {"batch_size": CHUNKS_A_RANK * ranks, "rank": ranks // 2, "ranks": ranks}
        steps = training_batches(stand_in(10**9), vocabulary, BERT_RULE, 42, **batch)
        milliseconds = []
        for _ in range(7):
            began = time.perf_counter()
            for _ in islice(steps, 64):
                pass
            milliseconds.append(1e3 * (time.perf_counter() - began) / 64)
        print(f"| {ranks} | {statistics.median(milliseconds):.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    prepare = modes.add_parser("prepare")
    prepare.add_argument("--gigabytes", type=float, default=2.0)
    prepare.add_argument("--text", type=Path, help="a folder with train.txt and test.txt, in place of what is made")
    prepare.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    prepare.add_argument("--kills", type=int, default=0)
    prepare.add_argument("--scratch", type=Path, help="where there is room for text and cache")
    modes.add_parser("ranks")
    one = modes.add_parser("one")  # `start` calls it
    for name, kind in (("text", Path), ("output", Path), ("tokenizer", Path), ("workers", int)):
        one.add_argument(name, type=kind)
    given = parser.parse_args()
    if given.mode == "one":
        print(json.dumps(prepare_once(given.text, given.output, given.tokenizer, given.workers)))
        return
    names = ("tokenizers", "numpy")
    print(platform.platform(), f"{os.cpu_count()} cores", *(f"{name} {version(name)}" for name in names), sep=", ")
    if given.mode == "ranks":
        return measure_ranks()
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        measure_preparation(given, Path(scratch))


if __name__ == "__main__":
    main()
