"""Text files to lines, one example per line: found, fetched or held out, and decoded with readable error messages."""

import codecs
import gzip
import hashlib
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import filterfalse
from pathlib import Path
from platform import python_version
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from Config import Config
from mlm.data.chinese import HAN_CHARACTER
from mlm.data.demo import write_corpus
from mlm.errors import UserError, first_line
from mlm.runtime.hub import WIKITEXT, locate, wants_wikitext
from mlm.storage import atomic_write, digest, lock, once
from mlm.terminal import progress_bar

LINES_BETWEEN_UPDATES = 500  # of a progress bar
BINARY = "a binary file, such as a Word document"


class Text(NamedTuple):
    """The lines of both splits, read anew by each call, and a digest of all that decides them."""

    train: Callable[[], Iterator[str]]
    test: Callable[[], Iterator[str]]
    digest: str


def text_folder(config: Config) -> Path:
    """Returns the folder that the text is read from; each version of Python has other documentation for the demo."""
    demo_folder = Path(config.path_model_save) / ".cache" / f"demo-{python_version()}"
    return demo_folder if config.demo else Path(config.path_datasets)


def find_text(config: Config) -> Text:
    """Finds the lines under `path_datasets`: train*.txt, and test*.txt or a seeded share of the distinct lines.

    A held-out line is held out wherever it is repeated. The demo first writes its text; the default folder, if it has
    none, first receives WikiText-2 from the Hub. Raises UserError where there is no text, or too little to hold some
    out.
    """
    folder = text_folder(config)
    if config.demo:
        once(folder, write_corpus)
    with lock(Path(config.path_model_save) / ".cache" / ".fetch.lock"):  # one process fetches, the others wait
        if wants_wikitext(config):
            _fetch_wikitext(folder)
    train, test = _files(folder, "train"), _files(folder, "test")
    if config.evaluate_only and not train:
        train = test  # of which nothing is shown
    if folder.is_file():
        raise UserError(f"path_datasets: {folder} is a file; give the folder, and name the file train.txt")
    if not train:
        name = "test*.txt" if config.evaluate_only else "train*.txt"
        raise UserError(f"path_datasets: no {name} in {folder}; put your text there, one example per line")
    digests = [[_file_digest(path) for path in paths] for paths in (train, test)]
    if test:
        return Text(partial(read_lines, train), partial(read_lines, test), digest(digests))
    return _hold_out(train, digests, config)


def _hold_out(files: list[Path], digests: list[list[str]], config: Config) -> Text:
    """Holds out that share of the distinct lines, at least one, whose salted hashes are below a limit, and caches it.

    Raises UserError where there are not two lines, one for each split.
    """
    salt = config.seed.to_bytes(8, "little")

    def write_limit(path: Path) -> None:
        hashes = distinct(array("Q", (line_hash(line, salt) for line in read_lines(files) if line)))
        if len(hashes) < 2:
            state = "holds one line only" if len(hashes) else "is empty"
            raise UserError(
                f"path_datasets: train*.txt in {files[0].parent} {state}; two are needed to train on one and test on "
                "one"
            )
        path.write_text(str(hashes[min(max(1, round(len(hashes) * config.test_fraction)), len(hashes) - 1)]))

    key = digest(digests, config.seed, config.test_fraction)
    limit = int(once(Path(config.path_model_save) / ".cache" / f"held-out-{key}", write_limit).read_text())

    def is_held_out(line: str) -> bool:
        return line_hash(line, salt) < limit

    return Text(
        train=lambda: filterfalse(is_held_out, read_lines(files)),
        test=lambda: filter(is_held_out, read_lines(files)),
        digest=digest(digests, config.seed, limit),
    )


def _files(folder, split=""):
    return sorted(path for ending in ("txt", "txt.gz") for path in folder.glob(f"{split}*.{ending}"))


def _file_digest(path):
    with _readable(path), open(path, "rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).hexdigest()


def line_hash(line: str, salt: bytes = b"") -> int:
    """Returns a 64-bit hash of a line, the same in every run."""
    return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8, salt=salt).digest(), "little")


def distinct(hashes: array) -> np.ndarray:
    """Returns the different hashes, sorted: np.unique's table takes 15 times as long and 6 times the memory."""
    in_order = np.sort(np.asarray(hashes, dtype=np.uint64))
    return np.concatenate([in_order[:1], in_order[1:][in_order[1:] != in_order[:-1]]])


def read_lines(files: list[Path], setting: str = "path_datasets") -> Iterator[str]:
    """Returns the lines of UTF-8 files (.gz too), stripped of surrounding white space. Raises as `decode_lines`."""
    return (line.strip() for line in decode_lines(files, setting))


def read_sample(path: Path, setting: str, limit: int) -> list[str]:
    """Returns at most `limit` lines that are not blank, spread evenly over a file, or over a folder's *.txt(.gz) files.

    Raises UserError, which names the setting, where there is none.
    """
    lines = list(filter(None, read_lines([path] if path.is_file() else _files(path), setting)))
    if not lines:
        raise UserError(f"{setting}: {path} is no file or folder of .txt files with a line of text in it")
    places = np.linspace(0, len(lines) - 1, min(limit, len(lines))).round().astype(int)
    return [lines[place] for place in places]


def decode_lines(files: list[Path], setting: str) -> Iterator[str]:
    r"""Yields the lines of UTF-8 files (.gz too), without their ends.

    Only \n and \r\n end a line; a lone \r stays inside it and is white space to the tokenizer.

    Raises UserError, naming setting, file and line, for bytes that are not UTF-8, and for a file that cannot be read.
    """
    for path in files:
        with (
            _readable(path, setting),
            open(path, "rb") as stored,
            progress_bar(f"reading {path.name}", path.stat().st_size, "B") as bar,
        ):
            file = cast(BinaryIO, gzip.GzipFile(fileobj=stored)) if path.suffix == ".gz" else stored
            for number, raw in enumerate(file, start=1):
                if number % LINES_BETWEEN_UPDATES == 0:
                    bar.update(stored.tell() - bar.n)
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    encoding = _likely_encoding(raw + file.read(1 << 16))
                    remedy = "" if encoding == BINARY else f", for example with iconv -f {encoding} -t UTF-8"
                    raise UserError(
                        f"{setting}: {path}, line {number} is not UTF-8; it looks like {encoding}. "
                        f"Save it as plain UTF-8 text{remedy}"
                    ) from error
                if number == 1 and not raw.endswith(b"\n") and b"\r" in raw.strip():
                    raise UserError(
                        f"{setting}: {path} is one line, as its lines end in \\r alone, which is white space here. "
                        f"Convert them, for example with tr '\\r' '\\n'"
                    )
                yield line.removesuffix("\n").removesuffix("\r")


def _likely_encoding(sample: bytes) -> str:
    """Returns the encoding that bytes which are no UTF-8 most likely have, by a name that iconv knows, or BINARY."""
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    if b"\0" in sample:
        return BINARY
    try:
        foreign = [c for c in codecs.getincrementaldecoder("gb18030")().decode(sample) if c > "\x7f"]
    except UnicodeDecodeError:
        return "WINDOWS-1252"
    chinese = sum(bool(HAN_CHARACTER.match(c)) for c in foreign)
    return "GBK" if chinese * 2 > len(foreign) else "WINDOWS-1252"


@contextmanager
def _readable(path, setting="path_datasets"):
    """Raises UserError, which names the setting, where the block cannot read the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{setting}: cannot read {path}: {error}") from error


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
