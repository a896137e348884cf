"""The demo's corpus: the documentation inside the reader's own Python. Its modules are parsed, not imported."""

import ast
import re
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

HELD_OUT_EVERY = 20  # paragraphs: one of them is held out
ENOUGH_PARAGRAPHS = 5000  # fewer mean that this Python ships without its documentation


def write_corpus(folder: Path) -> None:
    """Writes train.txt and test.txt: the documentation's distinct paragraphs, one per line, every 20th for testing."""
    library = Path(sysconfig.get_path("stdlib"))
    source = "the topics and docstrings of your Python's standard library"
    paragraphs = _distinct_paragraphs(chain(_topics(), _docstrings(library)))
    if len(paragraphs) < ENOUGH_PARAGRAPHS:
        import pandas  # here, as it is seldom needed

        source = "pandas' docstrings, as this Python ships without its own documentation"
        paragraphs = _distinct_paragraphs(_docstrings(Path(pandas.__file__).parent))
    folder.mkdir(parents=True)
    test = paragraphs[::HELD_OUT_EVERY]
    train = [paragraph for index, paragraph in enumerate(paragraphs) if index % HELD_OUT_EVERY]
    for name, split in (("test", test), ("train", train)):
        text = "".join(f"{paragraph}\n" for paragraph in split)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")
    print(f"demo corpus: {len(paragraphs):,} distinct paragraphs of {source}")


def _distinct_paragraphs(texts: Iterator[str]) -> list[str]:
    found = dict.fromkeys(" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text))
    return [paragraph for paragraph in found if len(paragraph.split()) >= 8]  # shorter ones are headings and signatures


def _topics():
    """Yields the texts of `help()`'s topics, where this Python has them."""
    with suppress(ImportError):
        from pydoc_data.topics import topics

        yield from topics.values()


def _docstrings(folder):
    """Yields the docstrings of the modules under a folder."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(folder.rglob("*.py")):
        if {"test", "tests", "site-packages"} & set(path.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # the library keeps a few files that are wrong on purpose
            continue
        yield from filter(None, (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)))
