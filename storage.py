"""Files and folders that are whole or absent: made under another name beside their place, then renamed."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a name for the block to make a file or a folder by; it becomes `path`, in place of what is there.

    Where the block fails, or the process is killed, `path` stays as it was. One writer at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, old = (path.with_name(f".{path.name}.{kind}") for kind in ("new", "old"))
    _restore(path, old)
    _remove(beside)  # what a killed process left
    try:
        yield beside
        _flush(beside)
        if path.is_dir():  # a folder cannot be replaced in one rename
            _remove(old)
            path.rename(old)
        beside.replace(path)
    finally:
        _restore(path, old)
        _remove(beside)
        _remove(old)


def _restore(path, old):
    if old.exists() and not path.exists():  # stopped between the two renames
        old.rename(path)


def _remove(path):
    path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def _flush(path):
    """Has the disk take what the operating system may still hold, so that a rename cannot outlive its content."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())


def lock(path: Path, timeout_s: float = -1) -> FileLock:
    """A lock for one process on this machine at a time; it ends with the process, however that ends.

    Entering it raises filelock.Timeout after `timeout_s` seconds of waiting; below 0 it waits as long as it takes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, timeout=timeout_s)


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made by one process on this machine if it is not there yet, while the others that ask for it wait.

    make: writes a file or a folder by the name it is given. What has lost a file, or a part of one, is made again.
    """
    if not _is_complete(path):
        with lock(path.with_name(f".{path.name}.lock")):
            if not _is_complete(path):
                with whole(path) as beside:
                    make(beside)
                _record(path).write_text(json.dumps(_sizes(path)))
    return path


def _record(path):
    return path.with_name(f".{path.name}.sizes")


def _sizes(path):
    files = [path] if path.is_file() else path.rglob("*")
    return {str(file.relative_to(path)): file.stat().st_size for file in files if file.is_file()}


def _is_complete(path):
    try:
        return path.exists() and json.loads(_record(path).read_text()) == _sizes(path)
    except (FileNotFoundError, ValueError):  # killed before the record, or in it
        return False


def digest(*parts: object) -> str:
    """32 hexadecimal digits that name a combination of values, for what is cached by it."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
