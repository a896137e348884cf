"""Text files to lines, one example per line: found, fetched or held out, and decoded with readable error messages."""

import bz2
import codecs
import gzip
import hashlib
import io
import lzma
import re
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, filterfalse
from pathlib import Path
from platform import python_version
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from Config import Config
from mlm.data.demo import write_corpus
from mlm.data.tables import read_table
from mlm.errors import UserError, first_line
from mlm.runtime.hub import WIKITEXT, is_aside, locate, wants_wikitext
from mlm.storage import atomic_write, digest, lock, once
from mlm.terminal import progress_bar

LINES_BETWEEN_UPDATES = 500  # of a progress bar
FORMATS = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKED = (".gz", ".bz2", ".xz", ".zst")
SPLIT_NAME = re.compile(r"(train|test)|(?:val|valid|validation|dev|devel|development|eval|evaluation)(?![a-z])")
SHOWN_NAMES = 5  # of files that are not read
SAMPLE_BYTES = 1 << 16  # of text that is not UTF-8
SURROGATES = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
ENCODINGS = {  # that charset-normalizer tells apart, by its names: those for Latin letters are not among them
    "gb18030": "GB18030", "big5": "BIG5", "cp932": "CP932", "euc_jp": "EUC-JP", "cp949": "CP949",
    "cp1251": "WINDOWS-1251", "koi8_r": "KOI8-R", "cp1253": "WINDOWS-1253", "cp1255": "WINDOWS-1255",
    "cp1256": "WINDOWS-1256", "cp874": "CP874",
}  # fmt: skip


class Text(NamedTuple):
    """The lines of both splits, read anew by each call, and a digest of all that decides them."""

    train: Callable[[], Iterator[str]]
    test: Callable[[], Iterator[str]]
    digest: str
    notes: Sequence[str] = ()  # lines for people about files that are not read, or not as their names say


def text_folder(config: Config) -> Path:
    """Returns the folder that the text is read from; each version of Python has other documentation for the demo."""
    demo_folder = Path(config.path_model_save) / ".cache" / f"demo-{python_version()}"
    return demo_folder if config.demo else Path(config.path_datasets)


def find_text(config: Config) -> Text:
    """Finds the lines under `path_datasets`: train*, and test*, else dev*, else a seeded share of the distinct lines.

    A held-out line is held out wherever it is repeated. The demo first writes its text; the default folder, if nothing
    is in it, first receives WikiText-2 from the Hub. Raises UserError where there is no text, or too little to hold
    some out.
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
    if config.evaluate_only and not train:
        train = test  # of which nothing is shown
    if not train:
        found = _name([*unread, *test], folder) or "nothing to read"
        split = "test" if config.evaluate_only else "train"
        raise UserError(
            f"path_datasets: no {split}*.txt in {folder}, which holds {found}. Put your text there, one example per "
            f"line; {split}*.jsonl, .csv, .tsv and .parquet are read too, and such files in a folder {split}*/"
        )
    if unread:
        notes.append(f"not read in {folder}: {_name(unread, folder)}")
    digests = [[_file_digest(path, config.text_column) for path in paths] for paths in (train, test)]
    if not test:
        return _hold_out(train, digests, config)._replace(notes=notes)
    read_train, read_test = (partial(read_texts, paths, config.text_column) for paths in (train, test))
    return Text(read_train, read_test, digest(digests), notes)


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
            ending = _format(file)
            if match and ending and file.is_file():
                kinds[match[1] or "dev"][is_inside, FORMATS.index(ending)].append(file)
            else:
                unread.append(file)
    files = {}
    for split, of_split in kinds.items():
        files[split], *others = [of_split[kind] for kind in sorted(of_split)] or [[]]
        unread += chain.from_iterable(others)
    return files, unread


def _format(path: Path) -> str:
    """Returns the ending of a file that can be read, in lower case and without .gz and the like; "" of another."""
    name = Path(path.name.lower())
    is_packed = name.suffix in PACKED
    ending = Path(name.stem).suffix if is_packed else name.suffix
    return ending if ending in FORMATS and not (is_packed and ending == ".parquet") else ""


def _name(paths: list[Path], folder: Path) -> str:
    """Returns the names of files, as many as fit a line."""
    names = [f"{path.relative_to(folder)}{'/' * path.is_dir()}" for path in paths]
    more = [f"{len(names) - SHOWN_NAMES:,} more"] if len(names) > SHOWN_NAMES else []
    return ", ".join(names[:SHOWN_NAMES] + more)


def _hold_out(files: list[Path], digests: list[list[str]], config: Config) -> Text:
    """Holds out that share of the distinct lines, at least one, whose salted hashes are below a limit, and caches it.

    Raises UserError where there are not two lines, one for each split.
    """
    salt = config.seed.to_bytes(8, "little")
    lines = partial(read_texts, files, config.text_column)

    def write_limit(path: Path) -> None:
        hashes = distinct(array("Q", (line_hash(line, salt) for line in lines() if line)))
        if len(hashes) < 2:
            state = "holds one line only" if len(hashes) else "is empty"
            raise UserError(
                f"path_datasets: the text of {_name(files, text_folder(config))} in {text_folder(config)} {state}; two "
                "lines are needed to train on one and test on one"
            )
        path.write_text(str(hashes[min(max(1, round(len(hashes) * config.test_fraction)), len(hashes) - 1)]))

    key = digest(digests, config.seed, config.test_fraction)
    limit = int(once(Path(config.path_model_save) / ".cache" / f"held-out-{key}", write_limit).read_text())

    def is_held_out(line: str) -> bool:
        return line_hash(line, salt) < limit

    return Text(
        train=lambda: filterfalse(is_held_out, lines()),
        test=lambda: filter(is_held_out, lines()),
        digest=digest(digests, config.seed, limit),
    )


def _file_digest(path, column):
    with _readable(path), open(path, "rb") as file:
        content = hashlib.file_digest(file, hashlib.blake2b).hexdigest()
    ending = _format(path)
    return content if ending == ".txt" else f"{content} {ending} {column}"


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


def read_texts(files: list[Path], column: str) -> Iterator[str]:
    """Yields the lines of text files, and of tables the texts in that column, stripped. Raises UserError."""
    for path in files:
        ending, lines = _format(path), decode_lines([path], "path_datasets")
        if ending == ".txt":
            yield from map(str.strip, lines)
        else:
            yield from read_table(path, ending, lines, column, "path_datasets")


def read_sample(path: Path, setting: str, limit: int) -> list[str]:
    """Returns at most `limit` lines that are not blank, spread evenly over a file, or over a folder's .txt files.

    Raises UserError, which names the setting, where there is none.
    """
    in_folder = sorted(file for file in path.glob("*") if _format(file) == ".txt" and not is_aside(file.name))
    lines = list(filter(None, read_lines([path] if path.is_file() else in_folder, setting)))
    if not lines:
        raise UserError(f"{setting}: {path} is no file or folder of .txt files with a line of text in it")
    places = np.linspace(0, len(lines) - 1, min(limit, len(lines))).round().astype(int)
    return [lines[place] for place in places]


def decode_lines(files: list[Path], setting: str) -> Iterator[str]:
    r"""Yields the lines of UTF-8 files (packed ones too), without their ends.

    Only \n and \r\n end a line; a lone \r stays inside it and is white space to the tokenizer.

    Raises UserError, naming setting, file and line, for bytes that are not UTF-8, and for a file that cannot be read.
    """
    for path in files:
        with (
            _readable(path, setting),
            open(path, "rb") as stored,
            progress_bar(f"reading {path.name}", path.stat().st_size, "B") as bar,
        ):
            file, all_ascii = _unpack(stored, path.suffix.lower()), True
            for number, raw in enumerate(file, start=1):
                if number % LINES_BETWEEN_UPDATES == 0:
                    bar.update(stored.tell() - bar.n)
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    place = len(raw) - len(error.object) + error.start  # a mark at the beginning of a file is left out
                    problem = _explain_bytes(raw, place, file.read(SAMPLE_BYTES), all_ascii)
                    raise UserError(f"{setting}: {path}, line {number} {problem}") from error
                if number == 1 and not raw.endswith(b"\n") and b"\r" in raw.strip():
                    raise UserError(
                        f"{setting}: {path} is one line, as its lines end in \\r alone, which is white space here. "
                        f"Convert them, for example with tr '\\r' '\\n'"
                    )
                all_ascii = all_ascii and line.isascii()
                yield line.removesuffix("\n").removesuffix("\r")


def _unpack(stored: BinaryIO, ending: str) -> BinaryIO:
    if ending == ".zst":
        import pyarrow as pa  # here, as most text needs none of it

        return io.BufferedReader(cast(io.RawIOBase, pa.CompressedInputStream(stored, "zstd")))
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers[ending](stored) if ending in openers else stored


def _explain_bytes(raw: bytes, place: int, rest: bytes, all_ascii: bool) -> str:
    """Returns what is wrong with a line that is not UTF-8 from `place` on, and what to do.

    rest: a sample of what follows; all_ascii: whether all lines before it are ASCII.
    """
    sample = raw[max(0, place - SAMPLE_BYTES) : place + SAMPLE_BYTES] + rest
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "is not UTF-8; it looks like UTF-16. Convert it with iconv -f UTF-16 -t UTF-8"
    if b"\0" in sample:
        return "is not UTF-8; it looks like a binary file, such as a Word document. Save it as plain UTF-8 text"
    decoded = codecs.getincrementaldecoder("utf-8")("replace").decode(SURROGATES.sub(b"", sample))
    damaged = decoded.count("\ufffd")
    whole = sum(character > "\x7f" for character in decoded) - damaged
    halves = SURROGATES.match(raw, place)
    if whole > 4 * damaged or (damaged <= 3 and (halves or not all_ascii)):
        what = "an emoji in two halves (surrogates, as Java and MySQL write it)" if halves else "a damaged character"
        remedy = "Remove the line, or all such characters with iconv -c -f UTF-8 -t UTF-8"
        return f"is UTF-8 but for {what} at byte {place + 1}. {remedy}"
    encoding = _likely_encoding(sample[: sample.rfind(b"\n") + 1] or sample)
    if not all_ascii:
        return f"is not UTF-8, as lines above it are{encoding and f'; it looks like {encoding}'}. Convert it by itself"
    if encoding:
        return f"is not UTF-8; it looks like {encoding}. Convert it with iconv -f {encoding} -t UTF-8"
    if len(re.findall(rb"[A-Za-z]", sample)) > len(re.findall(rb"[\x80-\xff]", sample)):
        western = "if its language is Western European, most likely with iconv -f WINDOWS-1252 -t UTF-8"
        return f"is not UTF-8. Convert it: {western}"
    return "is not UTF-8. Save it as plain UTF-8 text"


def _likely_encoding(sample: bytes) -> str:
    """Returns the encoding, by a name that iconv knows, of text in a language that can be told by it; else ""."""
    from charset_normalizer import from_bytes  # here, as most text needs none of it

    best = from_bytes(sample).best()
    if not best or not best.coherence:  # of no known language
        return ""
    return next((ENCODINGS[name] for name in best.could_be_from_charset if name in ENCODINGS), "")


@contextmanager
def _readable(path, setting="path_datasets"):
    """Raises UserError, which names the setting, where the block cannot read the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
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
