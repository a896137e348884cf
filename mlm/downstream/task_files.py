"""Labelled files -> examples: TSV, CSV, JSON, and CoNLL columns for entities. Errors name the file and line.

The standard library's readers are used, as pandas does not know the line of what is wrong: it fills short rows, takes
broken quotes, counts rows and not lines behind a cell with line breaks, and makes the label 1 the number 1.0.
"""

import csv
import json
import math
import re
import shlex
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from Config import DownstreamConfig
from mlm.errors import UserError, first_line
from mlm.text.lines import decode_lines

Kind = Literal["text", "pair", "entities"]
Row = tuple[int, list[Any]]  # the line of the file, from 1, and its cells
Sentence = list[tuple[int, str, str]]  # of each word the line, the word and its tag

JSON_ENDINGS, CONLL_ENDINGS = ("jsonl", "json", "ndjson"), ("conll", "bio", "iob", "iob2")
ENDINGS = ("tsv", "csv", "txt", *JSON_ENDINGS, *CONLL_ENDINGS)

# Usual names of columns, the likelier first; compared without regard to case.
PAIR_NAMES = (
    ("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("text1", "text2"), ("text_a", "text_b"),
    ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"), ("question", "answer"),
)  # fmt: skip
TEXT_NAMES = (
    "text", "sentence", "review", "content", "title", "question", "文本", "句子", "内容", "标题", "tokens", "words",
)  # fmt: skip
LABEL_NAMES = (
    "label", "labels", "class", "category", "target", "gold_label", "标签", "类别", "score", "ner_tags", "tags", "tag",
)  # fmt: skip

# Tags of words: outside of an entity; or the place in one (Begin, Inside, Middle, End, Last, Single, Unit, Whole) and
# its kind; or either alone. A kind alone has no place before or behind it.
OUTSIDE = ("O", "0")
TYPED = re.compile(r"([BIMELSUW])[-_](\S.*)")
PLACE_ALONE = re.compile(r"([BIMELSUW])()")
KIND_ALONE = re.compile(r"()((?![BI]$|[A-Za-z][-_])[^\W\d_]\S*(?<![-_][A-Za-z]))")
SEQEVAL_PLACES = dict(zip("BIMELSUW", "BIIEESSS", strict=True))


class Example(NamedTuple):
    """A text and its label; or two texts and their label; or words and a tag for each."""

    parts: tuple[str, ...]  # the text; the two texts; the words
    labels: tuple[str, ...]  # the one label; the tags: O, or B-, I-, E- or S- and the kind of entity


class LabelledFile(NamedTuple):
    """The examples of a file."""

    kind: Kind
    examples: list[Example]
    empty: int  # rows without a text or without a label, which are left out
    columns: str  # that were read, and those that were not, for people


def read_labelled(path: Path, config: DownstreamConfig) -> LabelledFile:
    """Reads one file, in the format that its name or its lines say.

    Raises UserError, which names the line, where the file is not what it seems to be.
    """
    ending = Path(path.name.lower().removesuffix(".gz")).suffix[1:]
    lines = list(decode_lines(path, "task"))
    columns_of_lines = [] if ending in (*JSON_ENDINGS, "csv") else [_split_columns(line) for line in lines]
    words = [(columns[0], columns[-1]) for columns in columns_of_lines if len(columns) > 1 and columns[0] != "#"]
    if ending in CONLL_ENDINGS or _are_tagged(words, columns_of_lines.count([])):
        sentences, described = _read_sentences(columns_of_lines, path)
        return LabelledFile("entities", _read_tags(sentences, path), 0, described)
    is_json = ending in JSON_ENDINGS
    titles, rows = _read_json(lines, path) if is_json else _read_table(lines, path, ending == "csv", config)
    columns = _choose_columns(titles, rows, config, path)
    described = _describe(titles or [f"column {column + 1}" for column in columns], columns)
    chosen = [(line, [cells[column] for column in columns]) for line, cells in rows]
    if any(isinstance(values[0], list) for _, values in chosen):
        sentences = [_pair_lists(values[0], values[-1], path, line) for line, values in chosen]
        examples = _read_tags(list(filter(None, sentences)), path)
        return LabelledFile("entities", examples, len(sentences) - len(examples), described)
    texts = [[_to_text(value, path, line) for value in values] for line, values in chosen]
    examples = [Example(tuple(parts), (label,)) for *parts, label in texts if all(parts) and label]
    if _are_tagged([(example.parts[0], example.labels[0]) for example in examples]):
        raise UserError(
            f"task: the labels of {path} look like tags of words ({examples[0].labels[0]}). For entities give the file "
            "the ending .conll, with a word and its tag a line, and a blank line between sentences"
        )
    kind: Kind = "text" if len(columns) == 2 else "pair"
    return LabelledFile(kind, examples, len(texts) - len(examples), described)


def _describe(names: list[str], read: list[int]) -> str:
    others = ", ".join(name for column, name in enumerate(names) if column not in read)
    return ", ".join(names[column] for column in read) + (f" (not read: {others})" if others else "")


def _read_table(lines: list[str], path: Path, is_csv: bool, config: DownstreamConfig) -> tuple[list[str], list[Row]]:
    """Reads a CSV, which has quotes, or a TSV, which has none, into titles, if it has any, and rows of one width."""
    csv.field_size_limit(2**31 - 1)
    with_ends = (line.replace("\r", " ") + "\n" for line in lines)
    unquoted = re.sub('"[^"]*"', "", next(filter(str.strip, lines), ""))
    delimiter = next((sign for sign in ",;\t" if sign in unquoted), ",") if is_csv else "\t"
    quoting: Any = csv.QUOTE_MINIMAL if is_csv else csv.QUOTE_NONE
    reader = csv.reader(with_ends, delimiter=delimiter, quoting=quoting, strict=True)
    rows: list[Row] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            rows.append((reader.line_num, [cell.strip() for cell in cells]))
            width = len(rows[0][1])
            if len(cells) != width or width == 1:
                wanted = "it should have a text and a label" if width == 1 else f"and those above have {width}"
                raise UserError(
                    f"task: {path}, line {reader.line_num} has {len(cells)} column(s), {wanted}. A tab separates the "
                    "columns of a .tsv or .txt file, a comma or semicolon those of a .csv"
                )
    except csv.Error as error:
        raise UserError(
            f'task: {path}, line {reader.line_num} is not CSV: {error}. A text that holds " or a comma must stand in '
            'quotes, its own quotes doubled (""); a quote that is not closed runs on to the end'
        ) from error
    lower = [title.lower() for title in rows[0][1]] if rows else []
    are_titles = {*lower} & {*LABEL_NAMES} or {*lower[:-1]} & {*TEXT_NAMES, *chain(*PAIR_NAMES)}
    if rows and (are_titles or config.text_column or config.pair_column or config.label_column):
        return rows[0][1], rows[1:]
    return [], rows


def _read_json(lines: list[str], path: Path) -> tuple[list[str], list[Row]]:
    """Reads objects, a line each or in one array; their keys are the columns."""
    text, place, line = "\n".join(lines), 0, 1
    objects: list[tuple[int, dict[str, Any]]] = []
    while found := re.compile(r"[^][\s,]").search(text, place):
        line += text.count("\n", place, found.start())
        try:
            content, place = json.JSONDecoder().raw_decode(text, found.start())
        except (ValueError, RecursionError) as error:
            raise UserError(f"task: {path}, line {line} is not JSON: {first_line(error)}") from error
        if not isinstance(content, dict) or not content:
            raise UserError(f'task: {path}, line {line} should be an object: {{"text": "...", "label": "..."}}')
        objects.append((line, content))
        line += text.count("\n", found.start(), place)
    titles = list(dict.fromkeys(chain.from_iterable(content for _, content in objects)))
    rows = [(number, [content.get(title) for title in titles]) for number, content in objects]
    return [_to_text(title, path, 1) for title in titles], rows


def _choose_columns(titles: list[str], rows: list[Row], config: DownstreamConfig, path: Path) -> list[int]:
    """Returns the columns of the text, the second text (if any) and the label: by settings, usual names or order."""
    if not rows:
        raise UserError(f"task: {path} holds no labelled text")
    if not titles:
        _refuse_other_orders(rows, path)
        return list(range(len(rows[0][1])))
    lower = [title.lower() for title in titles]

    def find(setting: str, usual_names: tuple[str, ...]) -> int:
        wanted = getattr(config, setting)
        names = [wanted.lower()] if wanted else usual_names
        found = next((lower.index(name) for name in names if name in lower), None)
        if found is None:
            named = f"named {wanted}" if wanted else f"of a usual name, such as {usual_names[0]}; say which it is"
            raise UserError(f"{setting}: {path} has no column {named}. It has {', '.join(titles)}")
        return found

    pair = next((names for names in PAIR_NAMES if {*names} <= {*lower}), None)
    label = find("label_column", LABEL_NAMES)
    if config.text_column is None and config.pair_column is None and pair:
        return [lower.index(pair[0]), lower.index(pair[1]), label]
    text = find("text_column", TEXT_NAMES)
    return [text, find("pair_column", ()), label] if config.pair_column else [text, label]


def _refuse_other_orders(rows: list[Row], path: Path) -> None:
    """Raises UserError where rows without titles are not text and label, or text, second text and label."""
    line, cells = rows[0]
    firsts, labels = ([row[column] for _, row in rows] for column in (0, -1))
    if len(cells) <= 3 and len(labels) < 10:  # too few to guess from
        return
    label_is_first = len({*firsts}) < len(firsts) / 4 and len({*labels}) > len(labels) / 2
    has_numbers = all(first.isdecimal() for first in firsts[1:]) and len({*firsts}) == len(firsts)
    if len(cells) > 3 or label_is_first or has_numbers:
        raise UserError(
            f"task: {path}, line {line} begins with {cells[0][:40]!r} and ends with {cells[-1][:40]!r}: are these text "
            f"and label? Put the text first and the label last; or name the {len(cells)} columns in a line above, text "
            "and label among them, or as --text_column and --label_column say"
        )
    if labels[0] not in labels[1:] and len({*labels[1:]}) < len(labels[1:]) / 4:
        settings = ("text", "label") if len(cells) == 2 else ("text", "pair", "label")
        flags = [f"--{name}_column {shlex.quote(cell)}" for name, cell in zip(settings, cells, strict=True)]
        raise UserError(
            f"task: line {line} of {path} ends with {labels[0]!r}, the label of no other line. If it names the "
            f"columns, say {' '.join(flags)}; if it does not, put a line above it that does"
        )


def _to_text(value: Any, path: Path, line: int) -> str:
    """Returns a cell as text, empty where it is missing. Raises UserError where it is no single value, or no text."""
    if isinstance(value, list | dict):
        wanted = "one text and one label, or two lists that --text_column and --label_column name: words and their tags"
        raise UserError(f"task: {path}, line {line} has a list or object; it should have {wanted}")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"task: {path}, line {line} holds a half of a character: {first_line(error)}") from error
    return text


def _pair_lists(words: Any, tags: Any, path: Path, line: int) -> Sentence:
    """Returns a sentence of two lists of JSON. Raises UserError where they are not words and a tag for each."""
    are_lists = isinstance(words, list) and isinstance(tags, list) and len(words) == len(tags)
    if not are_lists or not all(isinstance(value, str) for value in words + tags):
        wanted = "a list of words and one of as many tags, by names such as B-drug and not by numbers"
        raise UserError(f"task: {path}, line {line} should have {wanted}")
    texts = [_to_text(value, path, line) for value in words + tags]
    return [(line, word, tag) for word, tag in zip(texts[: len(words)], texts[len(words) :], strict=True)]


def _split_columns(line: str) -> list[str]:
    """Splits a line at its tabs if it has any, else at spaces. Other white space may be a word."""
    line = line.strip(" \t\r") if line.strip() else ""
    return [column.strip(" ") for column in line.split("\t")] if "\t" in line else re.findall("[^ ]+", line)


def _are_tagged(rows: list[tuple[str, str]], blank_lines: int = 0) -> bool:
    """Whether rows are words and tags, not texts and classes; by the tags, unless they might be classes: B, I and O."""
    scheme = _find_scheme([tag for _, tag in rows])
    words = [(word, tag) for word, tag in rows if len(word.split()) < 2]
    fitting = [tag for _, tag in words if tag in OUTSIDE or (scheme and scheme.fullmatch(tag))]
    places = {tag[0] for tag in fitting}
    is_likely = scheme is KIND_ALONE or places == {"O"} or (len(places) > 1 and places & {"B", "I"})
    repeat = len({word for word, _ in rows}) < 0.8 * len(rows) or 0 < blank_lines < len(rows) / 2
    return bool(is_likely and (repeat or scheme is TYPED) and len(fitting) > 0.9 * len(rows))


def _find_scheme(tags: list[str]) -> re.Pattern[str] | None:
    """Returns the form that most tags of entities have; kinds alone might be parts of speech where no tag is O."""
    counts = Counter(tag for tag in tags if tag not in OUTSIDE)
    schemes = (TYPED, PLACE_ALONE, KIND_ALONE) if counts.total() < len(tags) else (TYPED, PLACE_ALONE)
    matching = ((scheme, sum(counts[tag] for tag in counts if scheme.fullmatch(tag))) for scheme in schemes)
    return next((scheme for scheme, number in matching if number > counts.total() / 2), None)


def _read_sentences(rows: list[list[str]], path: Path) -> tuple[list[Sentence], str]:
    """Returns sentences of CoNLL columns (word first, or behind its number; tag last), and the columns for people.

    rows: the columns of each line. Before a sentence may stand comments, lines with # that have no tag or more columns.
    """
    words = [columns for columns in rows if columns and not columns[0].startswith(("#", "-DOCSTART-"))]
    width = Counter(map(len, words)).most_common(1)[0][0] if words else 2
    tags = {columns[-1] for columns in words}
    first = int(sum(columns[0].isdecimal() for columns in words) > 0.9 * len(words))  # behind a column of numbers
    sentences: list[Sentence] = [[]]
    for line, columns in enumerate(rows, start=1):
        if not columns or columns[0] == "-DOCSTART-":
            sentences.append([])
            continue
        is_tagged = len(columns) == width and (columns[-1] in tags or TYPED.fullmatch(columns[-1]))
        if columns[0].startswith("#") and not is_tagged and not sentences[-1]:
            continue
        if not len(columns) == width > first + 1 or (first and not columns[0].isdecimal()):
            wanted = f"should hold {'a number, ' * first}a word and a tag, in as many columns as others ({width})"
            raise UserError(f"task: {path}, line {line} {wanted}; it says {' '.join(columns)[:40]!r}")
        sentences[-1].append((line, columns[first], columns[-1]))
    sentences = list(filter(None, sentences))
    if len(sentences) < 2:
        raise UserError(f"task: {path} holds {len(sentences)} sentence(s); put a blank line between sentences")
    return sentences, _describe([f"column {column + 1}" for column in range(width)], [first, width - 1])


def _read_tags(sentences: list[Sentence], path: Path) -> list[Example]:
    """Returns sentences with the tags that seqeval knows: O, or B-, I-, E- or S- and the kind of entity.

    Neighbours of one kind are one entity where kinds stand alone. Raises UserError for a tag of another form.
    """
    scheme = _find_scheme([tag for sentence in sentences for _, _, tag in sentence])

    def convert(line: int, tag: str) -> str:
        if tag in OUTSIDE:
            return "O"
        if not (scheme and (match := scheme.fullmatch(tag))) or (line == 1 and tag.lower() in LABEL_NAMES):
            raise UserError(
                f"task: {path}, line {line} has the tag {tag[:40]!r}. Tags stand last: O, and all others either B-, "
                "I- (E-, S-) and the kind of entity, or B and I alone, or kinds alone"
            )
        return f"{SEQEVAL_PLACES.get(match[1], 'I')}-{match[2] or 'entity'}"

    converted = [[(word, convert(line, tag)) for line, word, tag in sentence] for sentence in sentences]
    return [Example(*zip(*sentence, strict=True)) for sentence in converted]
