"""Files and folders that are whole or absent: written under a temporary name beside their place, then renamed."""

import csv
import errno
import glob
import hashlib
import io
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
from filelock import FileLock

from mlm.errors import UserError

HOST = socket.gethostname()  # of several that may write to one disk
UMASK = os.umask(0o077)  # of this process; it can only be read by being set
os.umask(UMASK)


@contextmanager
def atomic_write(path: Path, setting: str = "path_model_save") -> Iterator[Path]:
    """Yields a temporary path; once the block has written a file or a folder there, that takes the place of `path`.

    Where the block fails, `path` stays as it was; where the process is killed, too, except that a folder killed between
    its two renames is put back by the next write. Several processes may write one file, and the last one's stays; a
    folder has one writer at a time. Raises UserError, which names `setting`, where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{HOST}.{os.getpid()}.new")
    previous = path.with_name(f".{path.name}.old")
    with _plain_refusal(path, setting):
        path.parent.mkdir(parents=True, exist_ok=True)
        _tidy(path, previous)
        try:
            yield temporary
            _flush(temporary)
            if path.is_dir():  # a folder cannot be replaced in one rename
                path.rename(previous)
            temporary.replace(path)
        finally:
            _tidy(path, previous)


@contextmanager
def write_beside_others(path: Path, unfinished: Path) -> Iterator[Path]:
    """Yields a temporary path, as `atomic_write`, for a file or a folder of which several processes, on one machine or
    many, may write the same at once: the first one's stays.

    unfinished: a folder on the same disk for what is not whole yet; a process that is killed leaves its own there.
    """
    temporary = unfinished / f"{path.name}.{uuid4().hex}"
    with _plain_refusal(path, "path_model_save"):
        unfinished.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _flush(temporary)
            try:
                temporary.rename(path)
            except OSError:
                if not path.exists():
                    raise
        finally:
            _remove(temporary)


@contextmanager
def _plain_refusal(path: Path, setting: str) -> Iterator[None]:
    """Raises UserError, which names `setting`, where the disk refuses what the block writes to `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # safetensors and tokenizers make errors of their own of what the system says
        if not isinstance(error, OSError) and "(os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{setting}: cannot write {path}: {reason}") from error


def _tidy(path, previous):
    """Removes what this process, and those of this machine that were killed while they wrote `path`, left beside it."""
    if previous.exists() and not path.exists():  # stopped between the two renames
        previous.rename(path)
    _remove(previous)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(HOST)}.*.new"):
        writer = leftover.name.split(".")[-2]
        is_at_work = writer.isdecimal() and int(writer) != os.getpid() and psutil.pid_exists(int(writer))
        if not is_at_work:
            _remove(leftover)


def _remove(path):
    if path.is_file():
        path.unlink(missing_ok=True)  # two writers may tidy up at once
    else:
        shutil.rmtree(path, ignore_errors=True)


def _flush(path):
    """Flushes to the disk before the rename, so that after a power cut no name stands for content that is missing. Each
    file gets the mode of any new file: safetensors writes files that nobody else on a shared machine could read."""
    for file in _files(path):
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
        with suppress(PermissionError):  # of a mounted disk that has one mode for all files
            file.chmod(0o666 & ~UMASK)


def make_folder(path: Path) -> None:
    """Makes a folder to be written to. Raises UserError where the disk refuses."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"path_model_save: cannot write to {path}: {error.strerror}") from error


def lock(path: Path, timeout_s: float = -1) -> FileLock:
    """Returns a lock for one process on this machine at a time; it ends with the process, however that ends. Entering
    it raises filelock.Timeout after `timeout_s` seconds of waiting; below 0 it waits as long as it takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, timeout=timeout_s)


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """Builds `path` if it is not there yet: once, under a lock, while other processes that ask for it wait. Returns it.

    make: writes a file or a folder at the path it is given. It is made again if a file is missing or of another size.
    """
    record = path.with_name(f".{path.name}.sizes")
    if not _is_complete(path, record):
        with lock(path.with_name(f".{path.name}.lock")):
            if not _is_complete(path, record):
                with atomic_write(path) as temporary:
                    make(temporary)
                record.write_text(json.dumps(sizes(path)))
    return path


def sizes(path: Path) -> dict[str, int]:
    """Returns the bytes of a file, or of each file below a folder, by the path from there."""
    return {str(file.relative_to(path)): file.stat().st_size for file in _files(path)}


def _files(path):
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _is_complete(path, record):
    try:
        return path.exists() and json.loads(record.read_text()) == sizes(path)
    except (FileNotFoundError, ValueError):  # killed before the record, or in it
        return False


def write_text(path: Path, text: str) -> None:
    """Writes a text file, atomically; several processes may write it at once."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a CSV file, atomically; what a row does not have stays empty."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_last_row(path: Path, columns: Sequence[str], row: Mapping[str, Any], is_new: bool) -> None:
    """Appends a row to a CSV file that `write_csv` wrote, or writes it in the place of the last one, which had fewer
    figures: in one write, so that a process that is killed leaves whole rows. Raises UserError as `atomic_write`."""
    text = io.StringIO()
    csv.DictWriter(text, columns).writerow(row)
    try:
        with open(path, "r+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 4096))  # a row is shorter
            last = file.read().splitlines(keepends=True)[-1:]
            file.seek(end if is_new else end - len(b"".join(last)))
            file.write(text.getvalue().encode())
            file.truncate()
    except OSError as error:
        raise UserError(f"path_model_save: cannot write {path}: {error.strerror}") from error


def read_csv(path: Path) -> list[dict[str, str]]:
    """Reads a CSV file with a header: a dict for each row, by column."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def digest(*parts: object) -> str:
    """Returns 32 hexadecimal digits that name a combination of values: a cache key."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
