"""Labelled files -> examples: TSV, CSV, JSON lines, and CoNLL columns for entities. Errors name the file and line.

The standard library's readers are used, as pandas does not know the line of what is wrong: it fills short rows, takes
broken quotes, counts rows and not lines behind a cell with line breaks, and makes the label 1 the number 1.0.
"""

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from Config import DownstreamConfig
from mlm.data.text_files import decode_lines
from mlm.errors import UserError, first_line

Kind = Literal["text", "pair", "entities"]

# Usual names of columns, the likelier first; compared without regard to case.
PAIR_NAMES = (
    ("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("text1", "text2"), ("text_a", "text_b"),
    ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"), ("question", "answer"),
)  # fmt: skip
TEXT_NAMES = ("text", "sentence", "review", "content", "title", "question", "文本", "句子", "内容", "标题")
LABEL_NAMES = ("label", "labels", "class", "category", "target", "gold_label", "标签", "类别")
TAG = re.compile(r"O|[BIES]-\S.*")  # of a word outside of an entity, or at its beginning, inside, at its end, or alone


class Example(NamedTuple):
    """A text and its label; or two texts and their label; or words and a tag for each."""

    parts: tuple[str, ...]  # the text; the two texts; the words
    labels: tuple[str, ...]  # the one label; the tags


class LabelledFile(NamedTuple):
    """The examples of a file."""

    kind: Kind
    examples: list[Example]
    empty: int  # rows without a text or without a label, which are left out
    columns: str  # that were read, and those that were not, for people


class Table(NamedTuple):
    """Rows of one width."""

    titles: list[str]  # of the columns; none where the file does not name them
    rows: dict[int, list[Any]]  # the cells by line of the file, from 1


def read_labelled(path: Path, config: DownstreamConfig) -> LabelledFile:
    """Reads one file, in the format that its name or its first lines say.

    Raises UserError, which names the line, where the file is not what it seems to be.
    """
    ending = Path(path.name.removesuffix(".gz")).suffix.lower()
    lines = decode_lines([path], "task")
    if ending in (".conll", ".bio", ".iob", ".iob2") or (ending in (".txt", ".tsv", "") and _has_tags(path)):
        return LabelledFile("entities", list(_read_sentences(lines, path)), 0, "")
    is_json = ending in (".json", ".jsonl", ".ndjson")
    table = _read_json(lines, path) if is_json else _read_table(lines, path, ending == ".csv", config)
    columns = _choose_columns(table, config, path)
    examples = []
    for line, cells in table.rows.items():
        *parts, label = (_to_text(cells[column], path, line) for column in columns)
        if all(parts) and label:
            examples.append(Example(tuple(parts), (label,)))
    _refuse_tags(examples, path)
    read = ", ".join(table.titles[column] for column in columns if table.titles)
    others = ", ".join(title for column, title in enumerate(table.titles) if column not in columns)
    described = (f"read: {read}" if read else "") + (f"; not read: {others}" if others else "")
    kind: Kind = "text" if len(columns) == 2 else "pair"
    return LabelledFile(kind, examples, len(table.rows) - len(examples), described)


def _read_table(lines: Iterable[str], path: Path, is_csv: bool, config: DownstreamConfig) -> Table:
    """Reads a CSV, which has quotes, or a TSV, which has none. Blank lines are left out."""
    csv.field_size_limit(2**31 - 1)
    with_ends = (line.replace("\r", " ") + "\n" for line in lines)
    delimiter = "," if is_csv else "\t"
    quoting: Any = csv.QUOTE_MINIMAL if is_csv else csv.QUOTE_NONE
    reader = csv.reader(with_ends, delimiter=delimiter, quoting=quoting, strict=True)
    rows: dict[int, list[str]] = {}
    width = 0
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            width = width or len(cells)
            if len(cells) != width or width == 1:
                wanted = "it should have a text and a label" if width == 1 else f"and those above have {width}"
                raise UserError(
                    f"task: {path}, line {reader.line_num} has {len(cells)} column(s), {wanted}"
                    f"{_suggest_delimiter(cells, delimiter)}"
                )
            rows[reader.line_num] = cells
    except csv.Error as error:
        raise UserError(
            f'task: {path}, line {reader.line_num} is not CSV: {error}. A text that holds " or a comma must stand in '
            'quotes, its own quotes doubled (""); a quote that is not closed runs on to the end'
        ) from error
    first = next(iter(rows), 0)
    titles = [cell.strip() for cell in rows.get(first, [])]
    are_named = config.text_column or config.pair_column or config.label_column
    if rows and (are_named or {title.lower() for title in titles} & {*LABEL_NAMES}):
        del rows[first]
        return Table(titles, rows)
    return Table([], rows)


def _suggest_delimiter(cells: list[str], delimiter: str) -> str:
    """Returns a hint where the columns of a row seem to be separated by something else."""
    names = {"\t": "a tab", ",": "a comma", ";": "a semicolon"}
    others = [name for other, name in names.items() if other != delimiter and other in cells[0]]
    if len(cells) > 1 or not others:
        return ""
    used = "A comma is read in a .csv file, a tab in a .tsv"
    if delimiter == "\t":
        used = "A tab is read in a .tsv or .txt file, a comma in a .csv"
    return f". Is the separator {others[0]}? {used}"


def _read_json(lines: Iterable[str], path: Path) -> Table:
    """Reads one object per line; its keys are the columns."""
    objects: dict[int, dict[str, Any]] = {}  # by line
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            objects[number] = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"task: {path}, line {number} is not JSON by itself: {first_line(error)}. A line should hold one object"
            ) from error
        if not isinstance(objects[number], dict):
            raise UserError(f'task: {path}, line {number} should be an object: {{"text": "...", "label": "..."}}')
    titles = list(dict.fromkeys(chain.from_iterable(objects.values())))
    return Table(titles, {line: [content.get(title) for title in titles] for line, content in objects.items()})


def _choose_columns(table: Table, config: DownstreamConfig, path: Path) -> list[int]:
    """Returns the columns of the text, the second text (if any) and the label: by settings, usual names or order."""
    if not table.rows:
        raise UserError(f"task: {path} holds no labelled text")
    if not table.titles:
        _refuse_other_orders(table, path)
        return list(range(len(next(iter(table.rows.values())))))
    lower = [title.lower() for title in table.titles]

    def find(setting: str, usual_names: tuple[str, ...]) -> int:
        wanted = getattr(config, setting)
        names = [wanted.lower()] if wanted else usual_names
        found = next((lower.index(name) for name in names if name in lower), None)
        if found is None:
            named = f"named {wanted}" if wanted else f"of a usual name, such as {usual_names[0]}; say which it is"
            raise UserError(f"{setting}: {path} has no column {named}. It has {', '.join(table.titles)}")
        return found

    pair = next((names for names in PAIR_NAMES if {*names} <= {*lower}), None)
    label = find("label_column", LABEL_NAMES)
    if config.text_column is None and config.pair_column is None and pair:
        return [lower.index(pair[0]), lower.index(pair[1]), label]
    text = find("text_column", TEXT_NAMES)
    return [text, find("pair_column", ()), label] if config.pair_column else [text, label]


def _refuse_other_orders(table: Table, path: Path) -> None:
    """Raises UserError where rows without titles are not text and label, or text, second text and label."""
    line, cells = next(iter(table.rows.items()))
    remedy = "Name the columns in line 1, text and label among them, or as --text_column and --label_column say"
    if len(cells) > 3:
        raise UserError(f"task: {path}, line {line} has {len(cells)} columns. {remedy}")
    rows = table.rows.values()
    firsts, labels = [row[0].strip() for row in rows], [row[-1].strip() for row in rows]
    if len(rows) < 10:  # too few to guess from
        return
    if len({*firsts}) < len(rows) / 4 and len({*labels}) > len(rows) / 2:
        raise UserError(
            f"task: the last column of {path}, which should hold labels, has {len({*labels}):,} different values in "
            f"{len(rows):,} lines, and the first has {len({*firsts}):,}. Put the text first. Or: {remedy}"
        )
    if all(first.isdecimal() for first in firsts[1:]) and len({*firsts}) == len(firsts):
        raise UserError(f"task: the first column of {path}, which should hold texts, numbers the lines. {remedy}")
    others = labels[1:]
    if labels[0] not in others and len({*others}) < len(others) / 4:
        raise UserError(
            f"task: line {line} of {path} ends with {labels[0]!r}, the label of no other line. If it names the "
            f"columns, say --text_column {firsts[0]} --label_column {labels[0]}; if it does not, put a line above it "
            "that does"
        )


def _refuse_tags(examples: list[Example], path: Path) -> None:
    """Raises UserError where the labels are tags of words."""
    labels = [example.labels[0] for example in examples]
    tags = sum(bool(TAG.fullmatch(label)) for label in labels)
    if tags > 0.9 * len(labels) and any(label.startswith("B-") for label in labels):
        raise UserError(
            f"task: the labels of {path} look like tags of words ({labels[0]}). For entities give the file the ending "
            ".conll, with a word and its tag a line, and a blank line between sentences"
        )


def _to_text(value: Any, path: Path, line: int) -> str:
    """Returns a cell as text, empty where it is missing. Raises UserError where it is no single value, or no text."""
    if isinstance(value, list | dict):
        raise UserError(f"task: {path}, line {line} has a list where one text or label should be")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"task: {path}, line {line} holds a half of a character: {first_line(error)}") from error
    return text


def _has_tags(path: Path) -> bool:
    """Whether the first lines look like CoNLL columns: a word first and a tag last."""
    lines = map(_split_columns, islice(decode_lines([path], "task"), 100))
    words = [columns for columns in lines if columns and columns[0] != "-DOCSTART-"]
    return bool(words) and all(len(columns) > 1 and TAG.fullmatch(columns[-1]) for columns in words)


def _split_columns(line: str) -> list[str]:
    """Splits a line at its tabs if it has any, else at spaces."""
    return [column.strip() for column in line.split("\t")] if "\t" in line.strip() else line.split()


def _read_sentences(lines: Iterable[str], path: Path) -> Iterator[Example]:
    """Yields sentences of CoNLL columns (word first, tag last), which blank lines separate."""
    sentence: list[tuple[str, str]] = []  # words and tags
    for number, line in enumerate(chain(lines, [""]), start=1):
        columns = _split_columns(line)
        if not columns or columns[0] == "-DOCSTART-":
            if sentence:
                yield Example(*zip(*sentence, strict=True))
            sentence = []
        elif len(columns) < 2 or not columns[0] or not TAG.fullmatch(columns[-1]):
            raise UserError(
                f"task: {path}, line {number} should hold a word and a tag: O, or B-, I-, E- or S- and the kind of "
                f"entity; it says {line.strip()[:40]!r}"
            )
        else:
            sentence.append((columns[0], columns[-1]))
