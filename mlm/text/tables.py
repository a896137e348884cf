"""Tables of text, JSON lines, CSV, TSV and Parquet, to the text of each row. Errors name the file and the line or row.

Lines are read by the standard library, as pandas does not know the line of what is wrong, and holds the whole table.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mlm.errors import UserError, first_line

LONGEST_CELL = 1 << 24  # characters: a quote that is not closed must not fill the memory
ROWS_AT_ONCE = 1024  # of a Parquet file


def read_table(
    path: Path,
    ending: str,
    lines: Iterable[str],
    column: str,
    setting: str,
    count_before: Callable[[], int] = lambda: 0,
) -> Iterator[str]:
    """Yields the text in the column of each row, with line feeds as spaces, stripped; empty where it is null.

    ending: of the format, such as .csv; lines: those of the file, where the format has lines, or the last of them,
    before which there are as many others as `count_before` finds.
    Raises UserError, which names setting, file and line (row), where a row is not of the format, or holds no string.
    """
    where = f"{setting}: {path}"

    def place(number: int) -> str:
        return f"{where}, {'row' if ending == '.parquet' else 'line'} {count_before() + number}"

    if ending == ".parquet":
        cells = _parquet_cells(path, where, column)
    elif ending in (".csv", ".tsv"):
        cells = _csv_cells(lines, where, column, is_csv=ending == ".csv")
    else:
        cells = _json_cells(lines, place, column)
    for number, cell in cells:
        if not isinstance(cell, str | None):
            raise UserError(f"{place(number)}: {column} is {cell!r:.40}, not a string; remove or convert it")
        text = (cell or "").replace("\n", " ").strip()
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{place(number)} holds half a character: {first_line(error)}") from error
        yield text


def _refuse_columns(where: str, column: str, columns: Iterable[Any], hint: str = "") -> None:
    if column not in columns:
        names = ", ".join(map(str, columns))
        raise UserError(f"{where} has no column {column}, but {names:.200}. Name the text's by text_column{hint}")


def _json_cells(lines: Iterable[str], place: Callable[[int], str], key: str) -> Iterator[tuple[int, Any]]:
    """Yields line and value of a key of one object per line; None for a blank line."""
    remedy = f'A line should hold one object, {{"{key}": "..."}}; jq -c .[] makes such lines of a list'
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else {key: None}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place(number)} is not JSON by itself: {first_line(error)}. {remedy}") from error
        if not isinstance(row, dict):
            raise UserError(f"{place(number)} is no object. {remedy}")
        if key not in row:
            _refuse_columns(place(number), key, row)
        yield number, row[key]


def _csv_cells(lines: Iterable[str], where: str, column: str, is_csv: bool) -> Iterator[tuple[int, Any]]:
    """Yields the first line and the cell of each row of a CSV, which has quotes, or a TSV, which has none."""
    csv.field_size_limit(LONGEST_CELL)
    quoting: Any = csv.QUOTE_MINIMAL if is_csv else csv.QUOTE_NONE
    with_ends = (line.replace("\r", " ") + "\n" for line in lines)
    rows = csv.reader(with_ends, delimiter="," if is_csv else "\t", quoting=quoting, strict=True)
    number, titles = 1, None
    try:
        for cells in rows:
            if titles is None:
                titles = [title.strip() for title in cells]
                used = "A comma separates columns in .csv" if is_csv else "A tab separates columns in .tsv"
                _refuse_columns(f"{where}, line {number}", column, titles, f". {used}; line 1 names them")
                place = titles.index(column)
            elif not cells:  # a blank line
                yield number, None
            elif len(cells) != len(titles):
                remedy = 'a text with a comma must stand in quotes, its own quotes doubled ("")'
                raise UserError(
                    f"{where}, line {number} has {len(cells)} column(s), and line 1 has {len(titles)}; "
                    f"{remedy if is_csv else 'a text must not hold a tab'}"
                )
            else:
                yield number, cells[place]
            number = rows.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{where}: the row that begins in line {number} is not CSV: {error}. Quotes inside a text are "
            'doubled (""); one that is not closed runs on to the end'
        ) from error


def _parquet_cells(path: Path, where: str, column: str) -> Iterator[tuple[int, Any]]:
    """Yields number, from 1, and cell of each row, some rows in memory at a time."""
    import pyarrow as pa  # here, as most text needs none of it
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            _refuse_columns(where, column, file.schema_arrow.names)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[column]):
                for number, cell in enumerate(batch.column(0), start=number + 1):  # noqa: B020
                    yield number, cell.as_py()
    except (OSError, ValueError, pa.ArrowException) as error:
        problem = f"cannot be read as Parquet from row {max(number, 1)} on: {first_line(error)}"
        raise UserError(f"{where} {problem}") from error
