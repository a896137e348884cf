"""Files and folders that are whole or absent: filled under another name beside their place, then renamed."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to fill; if the block succeeds it becomes `path`, in place of a folder of that name."""
    beside, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        if path.exists():
            path.rename(old)
        beside.rename(path)
    finally:
        if old.exists() and not path.exists():  # stopped between the two renames
            old.rename(path)
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields the name of a file to write; if the block succeeds it becomes `path`, in place of a file of that name."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def digest(*parts: object) -> str:
    """32 hexadecimal digits that name a combination of values, for what is cached by it."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
