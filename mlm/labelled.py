"""Labelled files -> examples: TSV, CSV, JSON lines, and CoNLL columns for entities; read with plain errors."""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from Config import DownstreamConfig
from mlm.errors import UserError, first_line
from mlm.text import decode_lines

Kind = Literal["text", "pair", "entities"]

TEXT_NAMES = (
    "text",
    "sentence",
    "sentence1",
    "sentence_1",
    "text1",
    "text_a",
    "premise",
    "question",
    "title",
    "content",
)
PAIR_NAMES = ("text2", "text_b", "sentence2", "sentence_2", "hypothesis", "question2", "answer", "pair")
LABEL_NAMES = ("label", "labels", "class", "category", "target", "gold_label")
TAG = re.compile(r"O|[BIES]-\S+")  # of a word outside of an entity, or at its beginning, inside, at its end, or alone


class Example(NamedTuple):
    """A text and its label; or two texts and their label; or words and a tag for each."""

    parts: tuple[str, ...]  # the text; the two texts; the words
    labels: tuple[str, ...]  # the one label; the tags


class LabelledFile(NamedTuple):
    """What a file holds."""

    kind: Kind
    examples: list[Example]
    empty: int  # rows without a text or without a label, which are left out


def read_labelled(path: Path, config: DownstreamConfig) -> LabelledFile:
    """Reads one file, in the format that its name or its first lines say.

    Raises UserError, which names the line, where the file is not what it seems to be.
    """
    ending = Path(path.name.removesuffix(".gz")).suffix.lower()
    lines = decode_lines([path], "task")
    if ending in (".conll", ".bio", ".iob", ".iob2") or (ending in (".txt", ".tsv", "") and _has_tags(path)):
        sentences = list(_sentences(lines, path))
        return LabelledFile("entities", sentences, 0)
    if ending in (".json", ".jsonl", ".ndjson"):
        table = _read_json(lines, path)
    else:
        table = _read_table(lines, path, "," if ending == ".csv" else "\t", config)
    columns = _choose_columns(table, config, path)
    examples, empty = [], 0
    for number, row in zip(table.line_numbers, table.rows, strict=True):
        *parts, label = (_cell(row[column], path, number) for column in columns)
        if all(parts) and label:
            examples.append(Example(tuple(parts), (label,)))
        else:
            empty += 1
    return LabelledFile("text" if len(columns) == 2 else "pair", examples, empty)


# -------------------------------------------------------------------------------------------------------------- tables


class Table(NamedTuple):
    """Rows of cells, as wide as each other."""

    titles: list[str]  # of the columns; none where the file does not name them
    rows: list[list[Any]]
    line_numbers: list[int]  # of the rows


def _read_table(lines: Iterable[str], path: Path, delimiter: str, config: DownstreamConfig) -> Table:
    """A TSV, which has no quotes, or a CSV, which has."""
    csv.field_size_limit(2**31 - 1)
    with_ends = (line + "\n" for line in lines)
    if delimiter == "\t":
        reader = csv.reader(with_ends, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(with_ends, strict=True)
    table = Table([], [], [])
    try:
        for row in reader:
            width = len(table.rows[0]) if table.rows else len(row)
            if len(row) != width and row:
                raise UserError(
                    f"task: {path}, line {reader.line_num} has {len(row)} column(s), and those above have {width}"
                )
            if row:
                table.rows.append(row)
                table.line_numbers.append(reader.line_num)
    except csv.Error as error:
        raise UserError(f"task: {path}, line {reader.line_num} cannot be read: {error}") from error
    titles = [cell.strip() for cell in table.rows[0]] if table.rows else []
    names = {title.lower() for title in titles}
    has_usual_names = names & {*LABEL_NAMES} and (names & {*TEXT_NAMES} or len(names) == 2)
    if has_usual_names or config.text_column or config.pair_column or config.label_column:
        return Table(titles, table.rows[1:], table.line_numbers[1:])
    return table


def _read_json(lines: Iterable[str], path: Path) -> Table:
    """One object a line; its keys are the columns."""
    objects = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            raise UserError(f"task: {path}, line {number} is not JSON: {first_line(error)}") from error
        if not isinstance(content, dict):
            raise UserError(
                f'task: {path}, line {number} should be an object such as {{"text": "...", "label": "..."}}'
            )
        objects.append((number, content))
    titles = list(dict.fromkeys(key for _, content in objects for key in content))
    rows = [[content.get(title) for title in titles] for _, content in objects]
    return Table(titles, rows, [number for number, _ in objects])


def _choose_columns(table: Table, config: DownstreamConfig, path: Path) -> list[int]:
    """Where text, second text (if any) and label stand in a row: by the settings, or by usual names, or by order."""
    if not table.rows:
        raise UserError(f"task: {path} holds no labelled text")
    if not table.titles:  # text and label, or text, second text and label
        width = len(table.rows[0])
        if not 2 <= width <= 3:
            raise UserError(
                f"task: {path}, line {table.line_numbers[0]} has {width} column(s). A line should hold a text and a "
                "label, or two texts and a label; other files need the names of their columns in line 1, among them "
                "text and label, or what --text_column and --label_column say"
            )
        _refuse_swapped(table.rows, path)
        return list(range(width))

    def find(setting: str, usual_names: tuple[str, ...]) -> int | None:
        wanted = getattr(config, setting)
        names = [wanted.lower()] if wanted else usual_names
        lower = [title.lower() for title in table.titles]
        found = next((lower.index(name) for name in names if name in lower), None)
        if found is None and (wanted or setting != "pair_column"):
            named = wanted or f"of a usual name, such as {usual_names[0]}"
            raise UserError(f"{setting}: {path} has no column {named}; it has {', '.join(table.titles)}")
        return found

    chosen = [
        find("text_column", TEXT_NAMES),
        find("pair_column", PAIR_NAMES),
        find("label_column", LABEL_NAMES),
    ]
    return [column for column in chosen if column is not None]


def _refuse_swapped(rows: list[list[str]], path: Path) -> None:
    """Raises UserError where the last of two columns looks like texts and the first like labels."""
    first, last = ({row[column] for row in rows} for column in (0, -1))
    if len(rows) >= 20 and len(first) < len(rows) / 4 and len(last) > len(rows) / 2:
        raise UserError(
            f"task: the last column of {path}, which should hold the labels, has {len(last):,} different values in "
            f"{len(rows):,} lines, and the first has {len(first):,}. Put the text first, or name the columns in line 1"
        )


def _cell(value: Any, path: Path, number: int) -> str:
    """A cell as text, empty where it is missing. Raises UserError where it is no single value."""
    if isinstance(value, list | dict):
        raise UserError(f"task: {path}, line {number} has a list where one text or label should be")
    return "" if value is None else str(value).strip()


# ------------------------------------------------------------------------------------------------------------ entities


def _has_tags(path: Path) -> bool:
    """Whether the first lines look like CoNLL columns: a word first and a tag last."""
    lines = (line.split() for line in islice(decode_lines([path], "task"), 100))
    columns = [line for line in lines if line and line[0] != "-DOCSTART-"]
    return bool(columns) and all(len(line) > 1 and TAG.fullmatch(line[-1]) for line in columns)


def _sentences(lines: Iterable[str], path: Path) -> Iterator[Example]:
    """Sentences of CoNLL columns (word first, tag last), which blank lines separate."""
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate(lines, start=1):
        columns = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or columns[0] == "-DOCSTART-":
            if words:
                yield Example(tuple(words), tuple(tags))
            words, tags = [], []
            continue
        tag = columns[-1].strip()
        if len(columns) < 2 or not TAG.fullmatch(tag):
            raise UserError(
                f"task: {path}, line {number} should end with a tag: O, or B- or I- and the kind of entity; it says "
                f"{line.strip()[:40]!r}"
            )
        words.append(columns[0].strip())
        tags.append(tag)
    if words:
        yield Example(tuple(words), tuple(tags))
