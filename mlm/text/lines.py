"""Files to lines of text, whole or in part, decoded with readable error messages."""

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from mlm.errors import UserError
from mlm.runtime.hub import is_aside

FORMATS = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKED = (".gz", ".bz2", ".xz", ".zst")
SAMPLE_BYTES = 1 << 16  # of text that is not UTF-8
COUNTED_BYTES = 1 << 20  # at once
SURROGATES = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
ENCODINGS = {  # that charset-normalizer tells apart, by its names: those for Latin letters are not among them
    "gb18030": "GB18030", "big5": "BIG5", "cp932": "CP932", "euc_jp": "EUC-JP", "cp949": "CP949",
    "cp1251": "WINDOWS-1251", "koi8_r": "KOI8-R", "cp1253": "WINDOWS-1253", "cp1255": "WINDOWS-1255",
    "cp1256": "WINDOWS-1256", "cp874": "CP874",
}  # fmt: skip


def is_packed(path: Path) -> bool:
    """Whether a file is compressed, by its name."""
    return path.suffix.lower() in PACKED


def format_of(path: Path) -> str:
    """Returns the ending of a file that can be read, in lower case and without .gz and the like; "" of another."""
    name = Path(path.name.lower())
    ending = Path(name.stem).suffix if is_packed(path) else name.suffix
    return ending if ending in FORMATS and not (is_packed(path) and ending == ".parquet") else ""


def read_lines(files: list[Path], setting: str = "path_datasets") -> Iterator[str]:
    """Returns the lines of UTF-8 files (.gz too), stripped of surrounding white space. Raises as `decode_lines`."""
    return (line.strip() for line in chain.from_iterable(decode_lines(path, setting) for path in files))


def read_sample(path: Path, setting: str, limit: int) -> list[str]:
    """Returns at most `limit` lines that are not blank, spread evenly over a file, or over a folder's .txt files.

    Raises UserError, which names the setting, where there is none.
    """
    in_folder = sorted(file for file in path.glob("*") if format_of(file) == ".txt" and not is_aside(file.name))
    lines = list(filter(None, read_lines([path] if path.is_file() else in_folder, setting)))
    if not lines:
        raise UserError(f"{setting}: {path} is no file or folder of .txt files with a line of text in it")
    places = np.linspace(0, len(lines) - 1, min(limit, len(lines))).round().astype(int)
    return [lines[place] for place in places]


def decode_lines(path: Path, setting: str, start: int = 0, end: int | None = None) -> Iterator[str]:
    r"""Yields the lines of a UTF-8 file (a packed one too), without their ends; with `start` and `end` those that begin
    from the one byte on and before the other.

    Only \n and \r\n end a line; a lone \r stays inside it and is white space to the tokenizer.

    Raises UserError, naming setting, file and line, for bytes that are not UTF-8, and for a file that cannot be read.
    """
    with readable(path, setting), open(path, "rb") as stored:
        if start:  # the line that stands there began before
            stored.seek(start - 1)
            stored.readline()
        place, all_ascii = stored.tell(), True
        file = _unpack(stored, path.suffix.lower())
        for number, raw in enumerate(file, start=1):
            if end is not None and place >= end:
                return
            place += len(raw)
            is_first = number == 1 and not start
            try:
                line = raw.decode("utf-8-sig" if is_first else "utf-8")
            except UnicodeDecodeError as error:
                before, all_ascii_before = _measure_before(path, start)
                wrong = len(raw) - len(error.object) + error.start  # a mark at the beginning of a file is left out
                problem = _explain_bytes(raw, wrong, file.read(SAMPLE_BYTES), all_ascii and all_ascii_before)
                raise UserError(f"{setting}: {path}, line {before + number} {problem}") from error
            if is_first and not raw.endswith(b"\n") and b"\r" in raw.strip():
                raise UserError(
                    f"{setting}: {path} is one line, as its lines end in \\r alone, which is white space here. "
                    f"Convert them, for example with tr '\\r' '\\n'"
                )
            all_ascii = all_ascii and line.isascii()
            yield line.removesuffix("\n").removesuffix("\r")


def count_lines_before(path: Path, start: int) -> int:
    """Returns how many lines of a file begin before a byte where, or behind which, another one begins."""
    return _measure_before(path, start)[0]


def _measure_before(path: Path, start: int) -> tuple[int, bool]:
    """Returns the lines that begin before a byte, and whether all bytes before it are ASCII."""
    if not start:
        return 0, True
    ends, all_ascii, last = 0, True, b""
    with open(path, "rb") as file:
        for first in range(0, start, COUNTED_BYTES):
            last = file.read(min(COUNTED_BYTES, start - first))
            ends += last.count(b"\n")
            all_ascii = all_ascii and last.isascii()
    return ends + (not last.endswith(b"\n")), all_ascii


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
def readable(path: Path, setting: str) -> Iterator[None]:
    """Raises UserError, which names the setting, where the block cannot read the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{setting}: cannot read {path}: {error}") from error
