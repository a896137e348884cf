"""Files and folders that are whole or absent: made under another name beside their place, then renamed."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a name for the block to make a file or a folder by; it becomes `path`, in place of what is there.

    Where the block fails, or is interrupted, `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    _remove(beside)  # what a killed process of the same number left
    try:
        yield beside
        if path.is_dir():  # a folder cannot be replaced in one rename
            path.rename(old)
        beside.rename(path)
    finally:
        if old.exists() and not path.exists():  # stopped between the two
            old.rename(path)
        _remove(beside)
        _remove(old)


def _remove(path):
    path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def digest(*parts: object) -> str:
    """32 hexadecimal digits that name a combination of values, for what is cached by it."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
