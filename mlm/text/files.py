"""The text of a run: which files are its training and its test text, how they are read, and what is not read."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from platform import python_version
from typing import Any, NamedTuple

from Config import Config
from mlm.errors import UserError, first_line
from mlm.runtime.hub import WIKITEXT, is_aside, locate, wants_wikitext
from mlm.storage import atomic_write, digest, lock, once
from mlm.text.demo import write_corpus
from mlm.text.lines import FORMATS, format_of, readable
from mlm.text.selection import Counts, Examined, Selection, examine
from mlm.text.units import Unit, cut_into_units

SPLIT_NAME = re.compile(r"(train|test)|(?:val|valid|validation|dev|devel|development|eval|evaluation)(?![a-z])")
SHOWN_NAMES = 5  # of files that are not read
DIGEST_BYTES = 1 << 20  # read at once


class Text(NamedTuple):
    """The lines of both splits, read anew by each call, and a digest of all that decides them."""

    selection: Selection
    examine: Callable[[Sequence[Unit]], Examined]  # reads all lines of units, unless that was done before
    digest: str
    notes: Sequence[str] = ()  # lines for people about files that are not read, or not as their names say

    def train(self) -> Iterator[str]:
        """Returns the training lines; the test text's where that is all there is."""
        return self.selection.lines(self.selection.splits[0])

    def test(self) -> Iterator[str]:
        """Returns the test lines."""
        return self.selection.lines("test")

    @property
    def size_bytes(self) -> int:
        """Of the files, or of the parts of them, that are read."""
        return sum(unit.size for unit in self.selection.units_read)

    def count_lines(self) -> Counts:
        """Returns how many lines there are, and how many are equal, once those to be left out are."""
        counts = self.examine(self.selection.units_read).counts
        if not self.selection.dropped:
            return counts
        left = counts.train_lines - counts.removable
        return counts._replace(train_lines=left, train_distinct=left, test_lines_in_train=0)


def text_folder(config: Config) -> Path:
    """Returns the folder that the text is read from; each version of Python has other documentation for the demo."""
    demo_folder = Path(config.path_model_save) / ".cache" / f"demo-{python_version()}"
    return demo_folder if config.demo else Path(config.path_datasets)


def find_text(config: Config) -> Text:
    """Finds the lines under `path_datasets`: train*, and test*, else dev*, else a seeded share of the distinct lines.

    A held-out line is held out wherever it is repeated; with `drop_duplicates` a repeated one is trained on once. The
    demo first writes its text; the default folder, if nothing is in it, first receives WikiText-2 from the Hub. Raises
    UserError where there is no text, or too little to hold some out.
    """
    folder = text_folder(config)
    if config.demo:
        once(folder, write_corpus)
    with lock(Path(config.path_model_save) / ".cache" / ".fetch.lock"):  # one process fetches, the others wait
        if wants_wikitext(config):
            _fetch_wikitext(folder)
    if not folder.is_dir():
        state = "is a file; give the folder, and name the file train.txt" if folder.exists() else "is no folder"
        raise UserError(f"path_datasets: {folder} {state}")
    files, unread = _sort_files(folder)
    train, test, dev, notes = files["train"], files["test"], files["dev"], []
    if dev and not test:
        test = dev
        notes.append(f"there is no test file, so the model is evaluated on {_name(dev, folder)}")
    else:
        unread += dev
    if not train and not (config.evaluate_only and test):
        found = _name([*unread, *test], folder) or "nothing to read"
        split = "test" if config.evaluate_only else "train"
        raise UserError(
            f"path_datasets: no {split}*.txt in {folder}, which holds {found}. Put your text there, one example per "
            f"line; {split}*.jsonl, .csv, .tsv and .parquet are read too, and such files in a folder {split}*/"
        )
    if unread:
        notes.append(f"not read in {folder}: {_name(unread, folder)}")
    return _select({"train": train, "test": test}, config)._replace(notes=notes)


def _select(files: dict[str, list[Path]], config: Config) -> Text:
    """Returns the lines of the files of each split as they are to be used. Raises UserError."""
    units = cut_into_units({split: paths for split, paths in files.items() if paths})
    digests = _digest_files(files, units, config.text_column)
    cache, column = Path(config.path_model_save) / ".cache", config.text_column
    share, drop = None if files["test"] else config.test_fraction, config.drop_duplicates and bool(files["train"])

    def look(units: Sequence[Unit]) -> Examined:
        return examine(cache, units, column, digest(digests), config.seed, share, drop)

    selection = Selection(units, column, config.seed)
    decides: list[Any] = [digests]
    if share is not None or drop:
        found = look(units)
        selection = selection._replace(limit=found.limit, dropped=found.path if drop else None)
        decides += [config.seed, found.limit, drop]
    if not files["train"]:
        selection = selection._replace(splits=("test",))
    return Text(selection, look, digest(*decides))


def without_training_text(text: Text) -> Text:
    """Returns the same text with nothing to train on."""
    selection = text.selection._replace(splits=("test",))
    return text._replace(selection=selection, digest=digest(text.digest, "the test text alone"))


def _sort_files(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Returns the files to read for "train", "test" and "dev", and what else lies there, but for READMEs.

    Of a split those in the folder itself go before those in folders inside, and the formats in the order of `FORMATS`;
    only the first kind is read: the train.jsonl beside a train.txt is most likely the same text.
    """
    kinds: dict[str, dict[tuple, list[Path]]] = {split: defaultdict(list) for split in ("train", "test", "dev")}
    unread = []
    for path in sorted(folder.iterdir()):
        if is_aside(path.name):
            continue
        match = SPLIT_NAME.match(path.name.lower())
        is_inside = bool(match) and path.is_dir()
        for file in sorted(path.rglob("*")) if is_inside else [path]:
            if any(map(is_aside, file.relative_to(folder).parts)) or (is_inside and file.is_dir()):
                continue
            ending = format_of(file)
            if match and ending and file.is_file():
                kinds[match[1] or "dev"][is_inside, FORMATS.index(ending)].append(file)
            else:
                unread.append(file)
    files = {}
    for split, of_split in kinds.items():
        files[split], *others = [of_split[kind] for kind in sorted(of_split)] or [[]]
        unread += chain.from_iterable(others)
    return files, unread


def _name(paths: list[Path], folder: Path) -> str:
    """Returns the names of files, as many as fit a line."""
    names = [f"{path.relative_to(folder)}{'/' * path.is_dir()}" for path in paths]
    more = [f"{len(names) - SHOWN_NAMES:,} more"] if len(names) > SHOWN_NAMES else []
    return ", ".join(names[:SHOWN_NAMES] + more)


def _digest_files(files: dict[str, list[Path]], units: Sequence[Unit], column: str) -> list[list[str]]:
    """Returns a digest of each file of each split, by those of its units, on all cores; and of how a table is read."""
    with ThreadPoolExecutor() as threads:  # hashing lets other threads run
        of_units = list(threads.map(_digest_unit, units))
    found: dict[Path, list[str]] = defaultdict(list)
    for unit, of_unit in zip(units, of_units, strict=True):
        found[unit.path].append(of_unit)

    def describe(path: Path) -> str:
        ending, of_units = format_of(path), found[path]
        content = of_units[0] if len(of_units) == 1 else digest(of_units)
        return content if ending == ".txt" else f"{content} {ending} {column}"

    return [[describe(path) for path in paths] for paths in files.values()]


def _digest_unit(unit: Unit) -> str:
    content, left = hashlib.blake2b(), unit.size
    with readable(unit.path, "path_datasets"), open(unit.path, "rb") as file:
        file.seek(unit.start)
        while left > 0 and (read := file.read(min(DIGEST_BYTES, left))):
            content.update(read)
            left -= len(read)
    return content.hexdigest()


def _fetch_wikitext(folder):
    """Downloads WikiText-2 (raw) into train.txt and test.txt. Raises UserError where that fails."""
    from datasets import DownloadConfig, load_dataset  # here, as it takes a second

    options = DownloadConfig(local_files_only=locate(**WIKITEXT) != "hub")
    print(f"{folder} holds no text: fetching WikiText-2 (raw) into it from the Hub", flush=True)
    try:
        dataset = {
            split: load_dataset(WIKITEXT["name"], "wikitext-2-raw-v1", split=split, download_config=options)
            for split in ("test", "train")  # train.txt is written last: a folder without it is not trained on
        }
    except Exception as error:  # whatever a broken connection or a changed data set make `datasets` raise
        raise UserError(
            f"path_datasets: WikiText-2 could not be fetched ({first_line(error)}); put text into {folder}"
        ) from error
    for split, rows in dataset.items():
        with atomic_write(folder / f"{split}.txt", "path_datasets") as temporary:
            text = "".join(line.rstrip("\n") + "\n" for line in rows["text"])
            temporary.write_text(text, encoding="utf-8", newline="\n")
