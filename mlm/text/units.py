"""Units: the parts in which a text is prepared, each by itself, so that many processes can share the work.

A unit is a range of a file's bytes, with the lines that begin in it, where lines can be found from anywhere; a file
that is compressed, or whose rows may hold line feeds, is a unit by itself. How a text is cut depends on its size alone.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mlm.text.lines import count_lines_before, decode_lines, format_of, is_packed
from mlm.text.tables import read_table

SMALLEST_UNIT_BYTES = 1 << 24  # some seconds of one core: little is lost where a process is killed, or the last to end
MOST_UNITS = 1 << 14  # so that no folder holds too many files
BLOCK_CHARACTERS = 1 << 19  # of lines that are tokenized at once: enough to keep every core busy, and memory small
IN_LINES = (".txt", ".jsonl", ".ndjson", ".json")


class Unit(NamedTuple):
    """The lines that begin in a range of a file's bytes."""

    path: Path
    split: str  # that the file is of: "train" or "test"
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


def cut_into_units(files: dict[str, list[Path]]) -> list[Unit]:
    """Returns the units of the files of each split, in their order."""
    sizes = {path: path.stat().st_size for paths in files.values() for path in paths}
    unit_bytes = max(SMALLEST_UNIT_BYTES, sum(sizes.values()) // MOST_UNITS)
    units = []
    for split, paths in files.items():
        for path in paths:
            can_be_cut = format_of(path) in IN_LINES and not is_packed(path)
            step = unit_bytes if can_be_cut else sizes[path]
            starts = range(0, max(1, sizes[path]), max(1, step))
            units += [Unit(path, split, start, min(start + step, sizes[path])) for start in starts]
    return units


def read_blocks(unit: Unit, column: str) -> Iterator[list[str]]:
    """Yields the lines of a unit of a text file, or of a table the texts in that column, stripped, in blocks of about
    BLOCK_CHARACTERS. Raises UserError, naming file and line, for what cannot be read."""
    return in_blocks(_read(unit, column))


def in_blocks(lines: Iterable[str]) -> Iterator[list[str]]:
    """Yields lines in blocks of about BLOCK_CHARACTERS."""
    block, size = [], 0
    for line in lines:
        block.append(line)
        size += len(line) + 1
        if size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _read(unit: Unit, column: str) -> Iterator[str]:
    ending = format_of(unit.path)
    is_whole = ending not in IN_LINES or is_packed(unit.path)
    lines = decode_lines(unit.path, "path_datasets", unit.start, None if is_whole else unit.end)
    if ending == ".txt":
        return map(str.strip, lines)
    before = partial(count_lines_before, unit.path, unit.start)
    return read_table(unit.path, ending, lines, column, "path_datasets", before)
