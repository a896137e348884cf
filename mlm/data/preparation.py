"""Lines to the files of chunks: each unit of the text by itself, by as many processes as share the work, and then all
of them end to end. What comes out does not depend on how many processes there were."""

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from Config import MOST_AUTOMATIC_WORDS
from mlm.data.chinese import Segmenter, make_segmenter
from mlm.data.chunks import cut_line, token_dtype, with_word_bits
from mlm.data.text_stats import SplitStats, TextStats, add_stats, length_bins, unknown_causes
from mlm.data.tokenizer import Vocabulary
from mlm.data.words import Encoders, WordCounts, tokenize
from mlm.errors import UserError
from mlm.runtime.together import UNFINISHED, Place, do_all
from mlm.storage import write_beside_others
from mlm.text.selection import Counts, Selection

COPIED_BYTES = 1 << 22  # at once
ARRAYS = ("tokens", "lengths", "lines")  # of a part: raw, as `Cut` has them


class Tools(NamedTuple):
    """What makes chunks of lines."""

    body_length: int  # tokens of a chunk, at most
    encoders: Encoders
    segmenter: Segmenter
    vocabulary: Vocabulary


class Recipe(NamedTuple):
    """What tools are made of, as another process can be sent it."""

    body_length: int
    encoders: tuple[str, str]
    user_words: Sequence[str]
    vocabulary: Vocabulary

    def make_tools(self) -> Tools:
        encoders, segmenter = Encoders.from_descriptions(self.encoders), make_segmenter(list(self.user_words))
        return Tools(self.body_length, encoders, segmenter, self.vocabulary)


class Tally(NamedTuple):
    """What is counted of lines; what is counted of parts of a text adds up."""

    stats: SplitStats
    occurrences: np.ndarray  # (vocabulary,) int64: how often each token occurs
    words: WordCounts

    @classmethod
    def of_nothing(cls, tools: Tools) -> "Tally":
        stats = SplitStats(
            lines=0, blank=0, duplicate=0, dropped=0, characters=0, tokens=0, unknown=0, chunks=0,
            line_lengths=[0] * len(length_bins(tools.body_length)),
        )  # fmt: skip
        return cls(stats, np.zeros(tools.vocabulary.size, np.int64), WordCounts())


class Cut(NamedTuple):
    """Lines cut into chunks."""

    tokens: np.ndarray  # (tokens,) as Chunks has them
    lengths: np.ndarray  # (chunks,) int32
    lines: np.ndarray  # (chunks,) uint64: the hash of the line that each is from


def cut_lines(lines: list[str], hashes: np.ndarray, tools: Tools, tally: Tally) -> tuple[Cut, Tally]:
    """Tokenizes lines and cuts them into chunks; hashes: (lines,). Returns them, and the tally with these lines."""
    filled = [index for index, line in enumerate(lines) if line]
    texts, vocabulary = [lines[index] for index in filled], tools.vocabulary
    tokenized = tokenize(texts, tools.encoders, vocabulary, tools.segmenter)
    of_lines = np.split(tokenized.starts_word, np.cumsum(tokenized.lengths)[:-1]) if filled else []
    lengths = [cut_line(starts_word, tools.body_length) for starts_word in of_lines]  # of each line's chunks
    cut = Cut(
        tokens=with_word_bits(tokenized.tokens, tokenized.starts_word, vocabulary.size),
        lengths=np.fromiter(chain.from_iterable(lengths), np.int32),
        lines=np.repeat(hashes[filled], list(map(len, lengths))),
    )
    occurrences = np.bincount(tokenized.tokens, minlength=vocabulary.size)
    is_unknown = tokenized.tokens == vocabulary.unk_id
    causes: Counter[str] = Counter()
    if is_unknown.any():
        of_unknown = np.repeat(np.arange(len(filled)), tokenized.lengths)[is_unknown]  # their lines
        causes = unknown_causes([texts[line] for line in np.unique(of_unknown)], tools.encoders.any_line)
    binned = np.histogram(tokenized.lengths, [*length_bins(tools.body_length), math.inf])[0]  # lines with a token
    stats = SplitStats(
        lines=len(lines),
        blank=len(lines) - len(filled),
        duplicate=0,  # which is known of a whole text alone
        dropped=len(filled) - int(binned.sum()),
        characters=sum(map(len, lines)),
        tokens=len(tokenized.tokens),
        unknown=int(is_unknown.sum()),
        chunks=len(cut.lengths),
        line_lengths=binned.tolist(),
        unknown_causes=dict(causes),
    )
    tally.words.update(tokenized.tokens, tokenized.starts_spaced, vocabulary, tokenized.segmented)
    return cut, Tally(add_stats(tally.stats, stats), tally.occurrences + occurrences, tally.words)


def write_chunks(selection: Selection, recipe: Recipe, counts: Counts, folder: Path, place: Place) -> None:
    """Writes the chunks of a text to folder/whole, a folder for each split, and its statistics, with whatever processes
    do the same. Raises UserError where a split has no token."""
    tools, unit_bytes = recipe.make_tools(), [unit.size for unit in selection.units]
    write = partial(_write_part, selection, tools)
    do_all("tokenizing text", folder / "parts", unit_bytes, write, place)
    parts = {split: _Parts.find(folder / "parts", len(unit_bytes), split, tools) for split in selection.splits}
    for split, of_split in parts.items():
        _reserve(folder / "whole" / split, of_split)
    do_all("joining parts", folder / "copied", unit_bytes, partial(_copy_part, parts, folder / "whole"), place)
    tallies = {split: _read_tally(of_split.folders, tools) for split, of_split in parts.items()}
    with write_beside_others(folder / "whole" / "stats.json", folder / UNFINISHED) as temporary:
        temporary.write_text(json.dumps(asdict(_summarise(tallies, counts, tools))))


def _write_part(selection: Selection, tools: Tools, index: int, path: Path) -> None:
    """Writes the chunks of a unit: a folder for each split, with ARRAYS and what was counted."""
    tallies = {split: Tally.of_nothing(tools) for split in selection.splits}
    with ExitStack() as opened:
        files = {}
        for split in selection.splits:
            (path / split).mkdir(parents=True)
            files[split] = [opened.enter_context(open(path / split / name, "wb")) for name in ARRAYS]
        for split, lines, hashes in selection.read(index):
            cut, tallies[split] = cut_lines(lines, hashes, tools, tallies[split])
            for array, file in zip(cut, files[split], strict=True):
                array.tofile(file)
    for split, tally in tallies.items():
        np.save(path / split / "occurrences.npy", tally.occurrences)
        counted = {"stats": asdict(tally.stats), "words": tally.words.to_json()}
        (path / split / "counted.json").write_text(json.dumps(counted))


def _read_tally(parts: Iterable[Path], tools: Tools) -> Tally:
    """Returns what was counted of all units together."""
    total = Tally.of_nothing(tools)
    for part in parts:
        counted = json.loads((part / "counted.json").read_text())
        total.words.add(counted["words"])
        stats = add_stats(total.stats, SplitStats(**counted["stats"]))
        total = Tally(stats, total.occurrences + np.load(part / "occurrences.npy"), total.words)
    return total


# ------------------------------------------------------------------------------------------- the files of all units


class _Parts(NamedTuple):
    """The parts of a split, and where each goes."""

    folders: list[Path]  # of all units
    token_dtype: np.dtype
    tokens_before: list[int]  # (units + 1,) each; the last is that of all
    chunks_before: list[int]

    @classmethod
    def find(cls, folder: Path, units: int, split: str, tools: Tools) -> "_Parts":
        """Raises UserError where all of them together have no token."""
        folders, dtype = [folder / str(unit) / split for unit in range(units)], token_dtype(tools.vocabulary.size)
        tokens, chunks = (
            list(accumulate(((part / name).stat().st_size // item_bytes for part in folders), initial=0))
            for name, item_bytes in (("tokens", dtype.itemsize), ("lengths", 4))
        )
        if not chunks[-1]:
            raise UserError(f"path_datasets: no line of {split}* holds a token to train or test on")
        return cls(folders, dtype, tokens, chunks)


def _reserve(folder: Path, parts: _Parts) -> None:
    """Makes the files of a split, as long as they will be, of zeros. Several processes may do so at once."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens, chunks = parts.tokens_before[-1], parts.chunks_before[-1]
    arrays = (("tokens", parts.token_dtype, tokens), ("offsets", np.int64, chunks + 1), ("lines", np.uint64, chunks))
    for name, dtype, length in arrays:
        (folder / f"{name}.npy").touch()
        with open(folder / f"{name}.npy", "r+b") as file:
            kind = np.lib.format.dtype_to_descr(np.dtype(dtype))
            np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": (length,)})
            file.truncate(file.tell() + length * np.dtype(dtype).itemsize)


def _copy_part(parts: Mapping[str, _Parts], whole: Path, index: int, path: Path) -> None:
    """Copies what was made of a unit to its place in the files of each split, and makes a file that says so."""
    for split, of_split in parts.items():
        part, tokens, chunks = of_split.folders[index], of_split.tokens_before[index], of_split.chunks_before[index]
        for name, before in (("tokens", tokens), ("lines", chunks)):
            with open(part / name, "rb") as source, _open_array(whole / split / f"{name}.npy", before) as target:
                shutil.copyfileobj(source, target, COPIED_BYTES)
        with open(part / "lengths", "rb") as source, _open_array(whole / split / "offsets.npy", chunks + 1) as target:
            while len(lengths := np.fromfile(source, np.int32, COPIED_BYTES // 4)):
                ends = tokens + np.cumsum(lengths, dtype=np.int64)
                ends.tofile(target)
                tokens = int(ends[-1])
    path.touch()


@contextmanager
def _open_array(file: Path, element: int) -> Iterator[IO]:
    """Opens the file of an array for writing from an element on."""
    with open(file, "r+b") as opened:
        np.lib.format.read_magic(opened)
        _, _, dtype = np.lib.format.read_array_header_1_0(opened)
        opened.seek(element * dtype.itemsize, os.SEEK_CUR)
        yield opened


def _summarise(tallies: dict[str, Tally], counts: Counts, tools: Tools) -> TextStats:
    """The statistics of both splits; the unigram perplexity with each count of the training text raised by one. Where
    the test text is alone, it stands for both."""
    test, train = tallies["test"], tallies.get("train", tallies["test"])
    log_shares = np.log((train.occurrences + 1) / (train.occurrences + 1).sum())  # (vocabulary,)
    of_test = replace(test.stats, duplicate=counts.test_lines - counts.test_distinct)
    of_train = replace(train.stats, duplicate=counts.train_lines - counts.train_distinct)
    return TextStats(
        train=of_train if "train" in tallies else of_test,
        test=of_test,
        test_lines_in_train=counts.test_lines_in_train,
        unigram_perplexity=math.exp(-(test.occurrences @ log_shares) / test.occurrences.sum()),
        split_words=train.words.split_words(tools.encoders.any_line, tools.vocabulary, MOST_AUTOMATIC_WORDS),
        removable_lines=counts.removable,
    )
