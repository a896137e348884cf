"""What is printed: lines, bars for what takes long, numbers as text, screens and pages from templates."""

import io
import math
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from accelerate import PartialState
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from tqdm import tqdm

SECONDS_BEFORE_A_BAR = 1.0
SECONDS_BETWEEN_LINES = 30.0  # in a file


class _Lines(io.TextIOBase):
    """A stream for tqdm that writes each state of a bar as a line of its own."""

    def write(self, text: str) -> int:
        if line := text.strip("\r\n "):
            print(line, file=sys.stderr, flush=True)
        return len(text)


def prepare_output() -> None:
    """Has a log file show each line at once, and a terminal that lacks a character its number; a notebook does both."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
        if sys.stdout.encoding.lower() != "utf-8":
            sys.stdout.reconfigure(errors="backslashreplace")


def progress_bar(what: str, total: int, unit: str, shown: bool = True, done: int = 0) -> tqdm:
    """Returns a bar that is shown after one second, and cleared at the end. Where stderr is no terminal, such as a log
    file or a notebook's output, it is a line every half minute. done: before, so that the time left is right."""
    options: dict[str, Any] = {"delay": SECONDS_BEFORE_A_BAR}
    if not sys.stderr.isatty():
        options = {"delay": SECONDS_BETWEEN_LINES, "mininterval": SECONDS_BETWEEN_LINES, "miniters": 1}
        options |= {"file": _Lines(), "ncols": 0}
    options |= {"initial": done, "disable": not shown}
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, leave=False, **options)


def steps_bar(total: int, done: int, shown: bool) -> tqdm:
    """Returns the bar of a run: steps, time, and what `set_postfix_str` is given; on a terminal only."""
    layout = "{percentage:3.0f}% |{bar}| step {n_fmt} of {total_fmt}, {elapsed} so far{postfix}"
    return tqdm(total=total, initial=done, bar_format=layout, disable=not (shown and sys.stderr.isatty()))


def say(line: str) -> None:
    """Prints a line on the main rank, above the progress bar, which a print would tear."""
    if PartialState().is_main_process:
        tqdm.write(line)


def figure(value: float) -> str:
    """Returns a perplexity as text, readable whatever its size."""
    if value >= 1e8:
        return f"{value:.2e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.2f}"


def with_error(value: float, standard_error: float) -> str:
    """Returns a perplexity as text, with its standard error where it has one."""
    return f"{figure(value)} ± {figure(standard_error)}" if math.isfinite(standard_error) else figure(value)


def size(size_bytes: int) -> str:
    """Returns a number of bytes as text."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html"]),  # what is put into a page is escaped
    undefined=StrictUndefined,
    trim_blocks=True,
)
_ENVIRONMENT.filters |= {"commas": "{:,}".format, "clock": tqdm.format_interval, "bytes": size}


def render(template: str, **values: Any) -> str:
    """Returns the text of a template, by its path in this package, with the values put in."""
    return _ENVIRONMENT.get_template(template).render(values)


def table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Returns rows of cells as lines, each column as wide as its widest cell and two spaces from the next.

    align: "<" (left) or ">" (right) for each column. A row may have fewer cells than there are columns.
    """
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    lines = []
    for row in rows:
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=False))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
