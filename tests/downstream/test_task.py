"""Labelled files: read in every format, refused by line, split without leaks."""

import gzip
import json
from collections import Counter

import pytest

from Config import DownstreamConfig
from mlm.downstream.task import load_task, normalize_text, sample_per_class
from mlm.downstream.task_files import Example
from mlm.errors import UserError

ROWS = [(f"text number {number}", "odd" if number % 2 else "even") for number in range(40)]
CONLL = "-DOCSTART- -X- O\n\n" + "".join(
    f"patient{n} NN O\ntook VB O\nmet{n} NN B-drug\nformin NN I-drug\n\n" for n in range(30)
)


def make_config(path, **changes):
    return DownstreamConfig(task=str(path), models=("some-model",), **changes)


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8", newline="")
    return path


def all_examples(task):
    return [*task.train, *task.dev, *task.test]


TABLES = {
    "plain.tsv": "".join(f"{text}\t{label}\n" for text, label in ROWS),
    "plain.txt": "".join(f"{text}\t{label}\r\n" for text, label in ROWS),
    "titled.tsv": "id\tLabel\tText\n" + "".join(f"7\t{label}\t{text}\n" for text, label in ROWS),
    "plain.csv": "".join(f'"{text}",{label}\n' for text, label in ROWS),
    "titled.csv": "label,text\n" + "".join(f"{label},{text}\n" for text, label in ROWS),
    "lines.jsonl": "".join(json.dumps({"label": label, "text": text, "meta": []}) + "\n" for text, label in ROWS),
    "bom.tsv": "\ufeff" + "".join(f"{text}\t{label}\n" for text, label in ROWS),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_format_holds_the_same_examples(tmp_path, name):
    task = load_task(make_config(write(tmp_path / name, TABLES[name])))
    assert task.kind == "text" and task.classes == ["even", "odd"]
    assert sorted(all_examples(task)) == sorted(Example((text,), (label,)) for text, label in ROWS)


def test_gzip_and_chosen_columns(tmp_path):
    content = "body,kind,title\n" + "".join(f'"{text}\nmore, and ""more""",{label},x\n' for text, label in ROWS)
    path = tmp_path / "task.csv.gz"
    path.write_bytes(gzip.compress(content.encode()))
    task = load_task(make_config(path, text_column="Body", label_column="kind"))
    assert sorted(all_examples(task))[0] == Example(('text number 0\nmore, and "more"',), ("even",))


@pytest.mark.parametrize("names", ["n\tquestion\tsentence", "n\tQuestion1\tquestion2", "n\tpremise\thypothesis"])
def test_usual_pairs_of_columns(tmp_path, names):
    rows = "".join(f"{n}\t{text}\tand {n}\t{label}\n" for n, (text, label) in enumerate(ROWS))
    task = load_task(make_config(write(tmp_path / "t.tsv", f"{names}\tlabel\n{rows}")))
    assert task.kind == "pair" and Example(("text number 3", "and 3"), ("odd",)) in all_examples(task)
    assert "label (not read: n); train" in task.read


def test_tags_with_spaces_between_tabs(tmp_path):
    content = CONLL.replace(" NN ", "\t").replace(" VB ", "\t").replace("drug", "Adverse Event")
    assert load_task(make_config(write(tmp_path / "t.conll", content))).classes[0] == "B-Adverse Event"


def test_small_classes_leave_something_for_every_split(tmp_path):
    rows = "".join(f"text {n} of {c}\tclass {c}\n" for c in range(20) for n in range(3))
    task = load_task(make_config(write(tmp_path / "t.tsv", rows)))
    assert [len(getattr(task, split)) for split in SPLITS] == [35, 5, 20]


def test_quotes_in_a_tsv_are_text(tmp_path):
    rows = [(f'"{text}', label) for text, label in ROWS]
    task = load_task(make_config(write(tmp_path / "t.tsv", "".join(f"{text}\t{label}\n" for text, label in rows))))
    assert sorted(all_examples(task)) == sorted(Example((text,), (label,)) for text, label in rows)


@pytest.mark.parametrize("title", ["", "sentence1\tsentence2\tlabel\n"])
def test_pairs_of_texts(tmp_path, title):
    rows = "".join(f"{text}\tsecond of {text}\t{label}\n" for text, label in ROWS)
    task = load_task(make_config(write(tmp_path / "pairs.tsv", title + rows)))
    assert task.kind == "pair" and len(all_examples(task)) == 40
    assert Example(("text number 3", "second of text number 3"), ("odd",)) in all_examples(task)


@pytest.mark.parametrize("name", ["ner.conll", "ner.txt", "ner.bio"])
def test_entities(tmp_path, name):
    task = load_task(make_config(write(tmp_path / name, CONLL)))
    assert task.kind == "entities" and task.classes == ["B-drug", "I-drug", "O"]
    assert Example(("patient3", "took", "met3", "formin"), ("O", "O", "B-drug", "I-drug")) in all_examples(task)
    assert len(all_examples(task)) == 30


# --------------------------------------------------------------------------------------------------------------- split


def test_a_split_keeps_the_share_of_each_class(tmp_path):
    rows = [(f"text {n}", "rare" if n % 10 == 0 else "common") for n in range(200)]
    task = load_task(make_config(write(tmp_path / "t.tsv", "".join(f"{text}\t{label}\n" for text, label in rows))))
    counts = {split: Counter(example.labels[0] for example in getattr(task, split)) for split in SPLITS}
    assert counts["test"] == {"rare": 4, "common": 36}
    assert counts["dev"] == {"rare": 2, "common": 18}
    assert len({normalize_text(example) for example in all_examples(task)}) == 200


SPLITS = ("train", "dev", "test")


def test_the_seed_decides_the_split(tmp_path):
    path = write(tmp_path / "t.tsv", TABLES["plain.tsv"])
    assert load_task(make_config(path)) == load_task(make_config(path))
    assert load_task(make_config(path)).digest != load_task(make_config(path, seed=1)).digest


def test_texts_in_two_splits_are_left_out_and_counted(tmp_path):
    for split, numbers in (("train", range(30)), ("valid", range(28, 34)), ("test", range(33, 40))):
        lines = [f"{ROWS[n][0]}  \t{ROWS[n][1]}\n" for n in numbers]
        write(tmp_path / "task" / f"{split}.tsv", "".join(lines))
    task = load_task(make_config(tmp_path / "task"))
    assert [len(getattr(task, split)) for split in SPLITS] == [28, 5, 7]
    assert not {*map(normalize_text, task.train)} & {*map(normalize_text, [*task.dev, *task.test])}
    assert task.notes[:2] == [
        "left out, as they train on a text of dev or test: 2",
        "left out, as they are of dev and of test: 1",
    ]


def test_repeated_and_empty_texts_are_left_out_and_counted(tmp_path):
    extra = "text number 1\todd\ntext number 2\todd\nTEXT\t\n \tabc\n \t \n"
    task = load_task(make_config(write(tmp_path / "t.tsv", TABLES["plain.tsv"] + extra)))
    assert len(all_examples(task)) == 40
    assert task.notes == [
        "left out, as text or label is empty: 2",
        "left out, as they repeat an earlier text: 2",
        "left out, among these with another label than the earlier one: 1",
    ]


def test_dev_is_held_out_of_train_where_there_is_no_file(tmp_path):
    for split, rows in (("train", ROWS[:30]), ("test", ROWS[30:])):
        write(tmp_path / "task" / f"{split}.csv", "".join(f"{text},{label}\n" for text, label in rows))
    task = load_task(make_config(tmp_path / "task"))
    assert len(task.train) + len(task.dev) == 30 and len(task.dev) >= 2
    assert task.test == [Example((text,), (label,)) for text, label in ROWS[30:]]


def test_rare_classes_are_said(tmp_path):
    rows = TABLES["plain.tsv"] + "a text of its own\tlonely\n"
    task = load_task(make_config(write(tmp_path / "t.tsv", rows)))
    assert "lonely" in task.classes and "classes that are never tested: lonely" in task.notes
    assert any(example.labels == ("lonely",) for example in task.train)


def test_a_class_that_nearly_all_have_is_said(tmp_path):
    rows = "".join(f"text {n}\t{'rare' if n % 20 == 0 else 'common'}\n" for n in range(200))
    [note] = load_task(make_config(write(tmp_path / "t.tsv", rows))).notes
    assert note.startswith("95% of the test texts are common") and "--metric macro_f1" in note


def test_few_examples_of_each_class(tmp_path):
    task = load_task(make_config(write(tmp_path / "t.tsv", TABLES["plain.tsv"])))
    drawn = [task.train[index].labels[0] for index in sample_per_class(task, "5", seed=1)]
    assert Counter(drawn) == {"even": 5, "odd": 5}
    assert sample_per_class(task, "5", 1) == sample_per_class(task, "5", 1) != sample_per_class(task, "5", 2)
    assert sorted(sample_per_class(task, "100", 1)) == sample_per_class(task, "all", 1) == list(range(len(task.train)))
    sentences = load_task(make_config(write(tmp_path / "n.conll", CONLL)))
    assert len(sample_per_class(sentences, "5", 1)) == 5


# ------------------------------------------------------------------------------------------------------- plain errors


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.tsv", "", "holds no labelled text"),
        ("t.tsv", "only a text\n", "line 1 has 1 column"),
        ("t.tsv", "a\tb\n\nc\td\te\n", "line 3 has 3 column"),
        ("t.tsv", "a\tb\tc\td\n", "--text_column"),
        ("t.csv", "a;b\nc;d\n", "leaves no text for dev. Read: column 1, column 2; "),
        ("t.tsv", "a,b\nc,d\n", "A tab separates the columns of a .tsv"),
        ("t.tsv", "tweet\tmood\n" + TABLES["plain.tsv"], "--text_column tweet --label_column mood"),
        ("t.csv", "id,tweet,label\n" + "7,a,b\n" * 20, "text_column: "),
        (
            "t.tsv",
            "".join(f"{n}\t{text}\t{label}\n" for n, (text, label) in enumerate(ROWS)),
            "begins with '0' and ends with 'even'",
        ),
        ("t.csv", "".join(f"w{n},{'B-drug' if n % 3 else 'O'}\n" for n in range(40)), "look like tags of words"),
        ("t.json", '[\n{"text": "a", "label": "b"}\n]\n', "nothing to tell apart"),
        ("t.json", '[{"text": "a", "label": "b"},\n{"text": "a", "lab', "line 2 is not JSON"),
        ("t.jsonl", '{"text": "a \\ud83d", "label": "b"}\n', "line 1 holds a half of a character"),
        ("t.jsonl", '\n{"a":' * 100_000, "line 2 is not JSON"),
        ("t.csv", 'a,b\n"c,d\n', "line 2 is not CSV"),
        ("t.jsonl", '{"text": "a", "label": "b"}\nnonsense\n', "line 2 is not JSON"),
        ("t.jsonl", "[1, 2]\n", "line 1 should be an object"),
        ("t.jsonl", '{"text": "a", "label": ["b", "c"]}\n', "line 1 has a list"),
        ("t.jsonl", '{"word": "a", "label": "b"}\n', "text_column: "),
        ("t.jsonl", '{"text": "a", "labe": "b"}\n', "It has text, labe"),
        ("t.conll", "a O\nb\n", "line 2 should hold a word and a tag"),
        ("t.tsv", "a\tx\nb\tx\nc\tx\nd\tx\ne\tx\nf\tx\n", "nothing to tell apart"),
        ("t.tsv", "a\tx\nb\ty\n", "leaves no text for"),
        ("t.tsv", "".join(f"yes\ttext {n}\n" for n in range(40)), "Put the text first"),
        ("t.tsv", "".join(f"text {n}\tlabel {n}\n" for n in range(40)), "different labels"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, name, content, said):
    with pytest.raises(UserError) as error:
        load_task(make_config(write(tmp_path / name, content)))
    assert said in str(error.value)


def test_missing_files_are_said(tmp_path):
    with pytest.raises(UserError, match="there is no file or folder"):
        load_task(make_config(tmp_path / "nowhere.tsv"))
    write(tmp_path / "task" / "train.tsv", TABLES["plain.tsv"])
    with pytest.raises(UserError, match=r"has no test file"):
        load_task(make_config(tmp_path / "task"))
    write(tmp_path / "task" / "test.conll", CONLL)
    with pytest.raises(UserError, match="different kinds"):
        load_task(make_config(tmp_path / "task"))


def test_bytes_that_are_not_utf_8_are_said_by_line(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes("好的\t一\n".encode() + "标题\t二\n".encode("gbk"))
    with pytest.raises(UserError, match=r"task: .*t.tsv, line 2 is not UTF-8, as lines above it are. Convert it"):
        load_task(make_config(path))
