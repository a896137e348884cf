"""Which lines of a text are trained on and which tested on: held out by a hash, and counted, or left out, where they
are equal. Equal means of the same 64-bit hash: of a billion different lines, two are taken for equal once in 40 texts.

A line's *key* is its hash, scrambled by the seed. Keys are sorted in runs, each with a line that is repeated but once,
and then compared in buckets of neighbouring keys, so that memory stays small for any text.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, count, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlm.errors import UserError
from mlm.randomness import line_keys
from mlm.runtime.together import UNFINISHED, Place, build_together, do_all
from mlm.storage import digest, write_beside_others
from mlm.text.units import Unit, read_blocks

RUN_LINES = 1 << 20  # sorted at once
BUCKET_LINES = 1 << 20  # compared at once, about: some 60 MB
BIN_BITS = 12  # of a key, the highest: a bucket is made of whole bins
SHOWN_NAMES = 5  # of files
RUN = np.dtype([("key", np.uint64), ("number", np.uint32), ("lines", np.uint32)])  # of a unit; how many are equal


class Counts(NamedTuple):
    """What is known of a text's lines, the blank ones aside."""

    train_lines: int
    train_distinct: int
    test_lines: int
    test_distinct: int
    test_lines_in_train: int  # lines of the test text that are lines of the training text, too
    removable: int  # lines of the training text that repeat an earlier one or stand in the test text


class Examined(NamedTuple):
    """What was found in a text."""

    path: Path  # a folder; with `drop` it holds, by units, the numbers of lines that are not to be trained on
    limit: int | None  # lines with keys below it are held out for testing; None: each file is of one split
    counts: Counts


class Selection(NamedTuple):
    """How the lines of a text are divided."""

    units: Sequence[Unit]
    column: str  # of tables
    seed: int
    limit: int | None = None  # as in Examined
    dropped: Path | None = None  # the folder in Examined, where such lines are left out
    splits: tuple[str, ...] = ("train", "test")  # that are read

    @property
    def units_read(self) -> list[Unit]:
        """The units that may hold lines of `splits`."""
        return list(filter(self._is_read, self.units))

    def _is_read(self, unit: Unit) -> bool:
        return self.limit is not None or unit.split in self.splits

    def read(self, index: int) -> Iterator[tuple[str, list[str], np.ndarray]]:
        """Yields the lines of a unit in blocks: the split, its lines, and their hashes (lines,) uint64."""
        unit, first = self.units[index], 0
        if not self._is_read(unit):
            return
        dropped = np.load(self.dropped / str(index)) if self.dropped else np.zeros(0, np.uint32)
        for block in read_blocks(unit, self.column):
            hashes = hash_lines(block)  # (lines,)
            is_test = np.full(len(block), unit.split == "test")
            if self.limit is not None:
                is_test = line_keys(self.seed, hashes) < np.uint64(self.limit)
            is_train = ~is_test
            begin, end = np.searchsorted(dropped, (first, first + len(block)))
            is_train[dropped[begin:end].astype(np.int64) - first] = False
            for split, is_of_split in (("train", is_train), ("test", is_test)):
                chosen = np.flatnonzero(is_of_split)
                if split in self.splits and len(chosen):
                    yield split, [block[line] for line in chosen.tolist()], hashes[chosen]
            first += len(block)

    def lines(self, wanted: str) -> Iterator[str]:
        """Yields the lines of a split, in their order."""
        alone = self._replace(splits=(wanted,))
        for index in range(len(self.units)):
            for _, lines, _ in alone.read(index):
                yield from lines


def hash_lines(lines: list[str]) -> np.ndarray:
    """Returns a 64-bit hash of each line, the same in every run: (lines,) uint64."""
    hashes = b"".join([hashlib.blake2b(line.encode(), digest_size=8).digest() for line in lines])
    return np.frombuffer(hashes, dtype="<u8")


def examine(
    cache: Path, units: Sequence[Unit], column: str, text_digest: str, seed: int, share: float | None, drop: bool
) -> Examined:
    """Returns what the lines of units are, once all have been read; it is kept under `cache`.

    share: of the different lines, at least one, that are to be held out for testing, or None; drop: whether lines of
    the training text that repeat an earlier one or stand in the test text are to be left out. Raises UserError where a
    text of which some is to be held out has not two different lines.
    """
    path = cache / f"lines-{digest(text_digest, [unit.split for unit in units], seed, share, drop)}"
    work = partial(_examine, Selection(units, column, seed), share, drop)
    build_together(path, sum(unit.size for unit in units), work)
    found = json.loads((path / "lines.json").read_text())
    return Examined(path, found["limit"], Counts(**found["counts"]))


def _examine(plain: Selection, share: float | None, drop: bool, folder: Path, place: Place) -> None:
    """Writes what `select` reads to folder/whole: limit and counts, and with `drop` the lines left out of each unit."""
    unit_bytes = [unit.size for unit in plain.units]
    do_all("reading text", folder / "runs", unit_bytes, partial(_sort_unit, plain), place)
    buckets = _make_buckets(folder / "runs")
    each = [1] * len(buckets)
    limit = None
    if share is not None:
        do_all(
            "holding out lines", folder / "distinct", each, partial(_count_distinct, folder / "runs", buckets), place
        )
        limit = _find_limit(folder, buckets, share, plain.units)
    splits = [unit.split for unit in plain.units]
    compare = partial(_compare, folder / "runs", buckets, splits, limit)
    do_all("comparing lines", folder / "compared", each, compare, place)
    if drop:
        do_all("leaving out lines", folder / "whole", unit_bytes, partial(_gather_dropped, folder), place)
    totals = dict.fromkeys(Counts._fields, 0)
    for bucket in range(len(buckets)):
        for name, lines in json.loads((folder / "compared" / str(bucket) / "counts.json").read_text()).items():
            totals[name] += lines
    (folder / "whole").mkdir(exist_ok=True)
    with write_beside_others(folder / "whole" / "lines.json", folder / UNFINISHED) as temporary:
        temporary.write_text(json.dumps({"limit": limit, "counts": totals}))


def _sort_unit(plain: Selection, index: int, path: Path) -> None:
    """Writes a unit's lines as runs, 0.npy, 1.npy and so on, and as repeats.npy the numbers of those that repeat an
    earlier one of their run."""
    path.mkdir()
    keys, numbers, repeats = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], [np.zeros(0, np.uint32)]
    first = runs = 0

    def end_run() -> None:
        nonlocal keys, numbers, runs
        run, repeated = _sort_run(np.concatenate(keys), np.concatenate(numbers))
        np.save(path / f"{runs}.npy", run)
        repeats.append(repeated)
        keys, numbers, runs = keys[:1], numbers[:1], runs + 1

    for block in read_blocks(plain.units[index], plain.column):
        filled = [number for number, line in enumerate(block) if line]
        keys.append(line_keys(plain.seed, hash_lines([block[number] for number in filled])))
        numbers.append(first + np.array(filled, dtype=np.int64))
        first += len(block)
        if sum(map(len, keys)) >= RUN_LINES:
            end_run()
    end_run()
    np.save(path / "repeats.npy", np.concatenate(repeats))


def _sort_run(keys: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the different keys of some lines, ascending, as RUN, and the numbers of lines that repeat an earlier one.

    keys, numbers: (lines,), the numbers ascending.
    """
    order = np.argsort(keys, kind="stable")
    keys, numbers = keys[order], numbers[order]
    is_first = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
    run = np.zeros(int(is_first.sum()), RUN)
    run["key"], run["number"] = keys[is_first], numbers[is_first]
    run["lines"] = np.diff(np.append(np.flatnonzero(is_first), len(keys)))
    return run, numbers[~is_first].astype(np.uint32)


def _make_buckets(folder: Path) -> list[tuple[int, int]]:
    """Returns the buckets, each as its first key and the one behind its last: of about BUCKET_LINES in all runs."""
    edges = np.arange(1 << BIN_BITS, dtype=np.uint64) << np.uint64(64 - BIN_BITS)
    begins = np.zeros(len(edges), dtype=np.int64)  # (bins,) in all runs together
    total = 0
    for file in folder.glob("*/[0-9]*.npy"):
        run = np.load(file, mmap_mode="r")
        begins += np.searchsorted(run["key"], edges)
        total += len(run)
    bounds = np.unique(np.searchsorted(begins, range(0, max(1, total), BUCKET_LINES), side="right") - 1)
    firsts = [int(edge) for edge in edges[bounds]]
    return list(pairwise([*firsts, 1 << 64]))


def _read_bucket(folder: Path, bucket: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lines of all runs with keys in a bucket, by key, then by their order in the text: as RUN (n,), and
    which unit each is of (n,)."""
    found, units = [], []
    for unit in sorted(int(path.name) for path in folder.glob("[0-9]*")):
        for number in count():
            if not (folder / str(unit) / f"{number}.npy").exists():
                break
            run = np.load(folder / str(unit) / f"{number}.npy", mmap_mode="r")
            begin = int(np.searchsorted(run["key"], np.uint64(bucket[0])))
            end = int(np.searchsorted(run["key"], np.uint64(bucket[1] - 1), side="right"))
            found.append(np.array(run[begin:end]))
            units.append(np.full(end - begin, unit, np.uint32))
    lines = np.concatenate(found)
    order = np.argsort(lines["key"], kind="stable")
    return lines[order], np.concatenate(units)[order]


def _count_distinct(folder: Path, buckets: list[tuple[int, int]], bucket: int, path: Path) -> None:
    lines, _ = _read_bucket(folder, buckets[bucket])
    path.write_text(str(len(np.unique(lines["key"]))))


def _find_limit(folder: Path, buckets: list[tuple[int, int]], share: float, units: Sequence[Unit]) -> int:
    """Returns the key below which that share of the different keys lies, but one at least, and not all."""
    counts = [int((folder / "distinct" / str(bucket)).read_text()) for bucket in range(len(buckets))]
    if sum(counts) < 2:
        state = "holds one line only" if sum(counts) else "is empty"
        files = list(dict.fromkeys(unit.path for unit in units))
        names = ", ".join(path.name for path in files[:SHOWN_NAMES])
        raise UserError(
            f"path_datasets: the text of {names} in {files[0].parent} {state}; two lines are needed to train on one "
            "and test on one"
        )
    held_out = min(max(1, round(sum(counts) * share)), sum(counts) - 1)
    before = [0, *accumulate(counts)]
    bucket = int(np.searchsorted(before, held_out, side="right")) - 1
    lines, _ = _read_bucket(folder / "runs", buckets[bucket])
    return int(np.unique(lines["key"])[held_out - before[bucket]])


def _compare(
    folder: Path, buckets: list[tuple[int, int]], splits: list[str], limit: int | None, bucket: int, path: Path
) -> None:
    """Writes the counts of a bucket, and which lines of the training text are equal to an earlier one, or to one of the
    test text: unit and number of each, in their order."""
    lines, units = _read_bucket(folder, buckets[bucket])
    if limit is None:
        is_test = np.array([split == "test" for split in splits])[units]  # (n,)
    else:
        is_test = lines["key"] < np.uint64(limit)
    starts = np.flatnonzero(np.append(True, lines["key"][1:] != lines["key"][:-1])[: len(lines)])  # of equal ones
    equal = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(lines))))  # (n,)
    in_test, in_train = (np.bincount(equal, weights=of, minlength=len(starts)) > 0 for of in (is_test, ~is_test))
    train = np.flatnonzero(~is_test)
    is_repeated = np.append(False, equal[train][1:] == equal[train][:-1])[: len(train)]
    removed = train[is_repeated | in_test[equal[train]]]
    counts = Counts(
        train_lines=int(lines["lines"][~is_test].sum()),
        train_distinct=int(in_train.sum()),
        test_lines=int(lines["lines"][is_test].sum()),
        test_distinct=int(in_test.sum()),
        test_lines_in_train=int(lines["lines"][is_test & in_train[equal]].sum()),
        removable=int(lines["lines"][~is_test].sum() - (in_train & ~in_test).sum()),
    )
    path.mkdir()
    (path / "counts.json").write_text(json.dumps(counts._asdict()))
    in_order = np.lexsort((lines["number"][removed], units[removed]))
    np.save(path / "units.npy", units[removed][in_order])
    np.save(path / "numbers.npy", lines["number"][removed][in_order])


def _gather_dropped(folder: Path, unit: int, path: Path) -> None:
    """Writes the numbers of a unit's lines that are not to be trained on, ascending."""
    numbers = [np.load(folder / "runs" / str(unit) / "repeats.npy")]
    for bucket in (folder / "compared").glob("[0-9]*"):
        units = np.load(bucket / "units.npy", mmap_mode="r")
        begin, end = np.searchsorted(units, (unit, unit + 1))
        numbers.append(np.load(bucket / "numbers.npy", mmap_mode="r")[begin:end])
    with open(path, "wb") as file:
        np.save(file, np.sort(np.concatenate(numbers)))
