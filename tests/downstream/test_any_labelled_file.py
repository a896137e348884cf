"""Whatever lies where a labelled file should be: it is read, or what is wrong is said in one line.

More of it: EXAMPLES=3000 pytest tests/downstream/test_any_labelled_file.py
"""

import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, event, example, given, settings, strategies
from test_labelled_files import BIO, BIOBERT, IO, LISTS, tagged
from test_task import SPLITS, all_examples, make_config

from mlm.downstream.metrics import count_predictions
from mlm.downstream.results import describe_task
from mlm.downstream.task import entity_types, load_task
from mlm.errors import UserError

EXAMPLES = int(os.environ.get("EXAMPLES", 300))

CELLS = [
    "text", "label", "a text", "第一条", "yes", "no", "O", "0", "1", "2.5", "B", "I-X", "B-X", "E_Y", "DNA", "#",
    "-DOCSTART-", "", " ", "\u3000", "\x00", "\x0b", "\r", "\ufeff", '"', "[1]", "nan", "\udc80",
]  # fmt: skip
OBJECTS = [
    '{"text": "a", "label": "b"}', '{"text": "a b", "label": 1}', '{"text": "\\ud83d", "label": NaN}', "{}", "[", "]",
    '{"tokens": ["a", "b"], "ner_tags": ["O", "B-X"]}', '{"tokens": ["a"], "tags": [0]}', "null", "{", "[]", ",",
    '{"tokens": ["a"], "ner_tags": ["B-\\ud83d"]}', '{"\\udc80": "a", "label": []}', "1" * 5000,
    '{"text": {"a": 1}, "label": "b"}', '{"tokens": [], "ner_tags": []}', '{"tokens": ["w"], "ner_tags": ["DNA"]}',
]  # fmt: skip
WHOLE = {
    ".tsv": "".join(f"text {n}\t{'yes' if n % 3 else 'no'}\n" for n in range(30)),
    ".csv": "n;text;label\n" + "".join(f'{n};"a; {n}";{n % 2}\n' for n in range(30)),
    ".jsonl": "".join(f'{{"text": "t{n}", "label": {n % 2}}}\n' for n in range(30)),
    ".json": json.dumps([{"tokens": words, "ner_tags": tags} for words, tags in LISTS], indent=0),
    ".conll": tagged("{number}\t{word}\tNN\t{tag}", *BIO),
    ".txt": tagged("{word} {tag}", *IO),
    ".bio": "# comment\n" + tagged("{word} {tag}", *BIOBERT),
}
ENDINGS = [*WHOLE, "", ".CSV", ".tsv.gz", ".parquet"]
STEMS = ["train", "test", "dev", "val", "Devel", "train_dev", "README", ".hidden", "dev-1"]


@strategies.composite
def damaged(draw, ending: str) -> bytes:
    """A whole file of which some lines are others; of this ending or another."""
    content = WHOLE[draw(strategies.sampled_from([ending] * 8 + [*WHOLE]))]
    separator = draw(strategies.sampled_from(["\t", ",", ";", " "]))
    cells = strategies.lists(strategies.sampled_from(CELLS), min_size=1, max_size=4).map(separator.join)
    others = strategies.lists(cells | strategies.sampled_from(OBJECTS), max_size=2).map("\n".join)
    lines = content.split("\n")
    for _ in range(draw(strategies.integers(0, 2))):
        place = draw(strategies.integers(0, len(lines)))
        lines[place : place + draw(strategies.sampled_from([0, 0, 1, 40]))] = [draw(others)]
    end = draw(strategies.sampled_from(["\n", "\n", "\r\n"]))
    return end.join(lines).encode("utf-8", "surrogateescape")


@strategies.composite
def file_sets(draw) -> dict[str, bytes]:
    """Contents by name: a file, or a folder of splits with or without others."""
    ending = draw(strategies.sampled_from([*WHOLE]))
    files = {f"{stem}{ending}": draw(damaged(ending)) for stem in draw(strategies.sampled_from([STEMS[:1], STEMS[:2]]))}
    for stem in draw(strategies.lists(strategies.sampled_from(STEMS), max_size=2)):
        other = draw(strategies.sampled_from([ending] * 4 + ENDINGS))
        files[stem + other] = draw(damaged(ending) | strategies.binary(max_size=30))
    return files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("labelled") / "task"


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(files=file_sets(), as_folder=strategies.booleans())
@example(files={"train.jsonl": b"", "test.jsonl": b"\n"}, as_folder=True)
@example(files={"a.jsonl": b"{}\n"}, as_folder=False)
@example(
    files={"a.jsonl": b"".join(b'{"text": "%d", "label": 1, "\\udc80": 1}\n' % n for n in range(9))}, as_folder=False
)
@example(files={"a.tsv": b"text\tlabel\n" + b"x\ty\n" * 20}, as_folder=False)
@example(files={"train.tsv": b"a\tb\n", "test.tsv": b"a\tb\n", "\udcff.tsv": b""}, as_folder=True)
def test_any_labelled_file_is_read_or_refused(folder, files, as_folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    path = folder if as_folder else folder / next(iter(files))
    try:
        task = load_task(make_config(path))
    except UserError as refused:
        said = str(refused)
        assert (
            "\n" not in said
            and str(folder) in said
            and said.partition(": ")[0] in ("task", "text_column", "label_column")
        )
        return event("refused")
    event(f"read as {task.kind}")
    assert all(example.parts and example.labels for example in all_examples(task))
    if task.kind == "entities":
        assert all(len(example.parts) == len(example.labels) for example in all_examples(task)) and entity_types(
            task.classes
        )
    for split in SPLITS:
        examples = getattr(task, split)
        assert count_predictions(task, task.targets(examples), examples).shape[:2] == (len(examples), 3)
    assert task.digest
    described = describe_task(task).encode().decode()  # it can be printed
    assert described.count("\n") == len(task.notes)
    assert sorted(path.name for path in folder.iterdir()) == sorted(files)
