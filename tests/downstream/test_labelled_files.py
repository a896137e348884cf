"""Labelled files as people have them: read as they were meant, or refused by file, place and remedy."""

import json

import pytest
from seqeval.metrics.sequence_labeling import get_entities
from test_task import SPLITS, all_examples, make_config, write

import downstream
from mlm.downstream.metrics import count_predictions, micro_f1
from mlm.downstream.results import describe_task
from mlm.downstream.task import entity_types, load_task
from mlm.errors import UserError, plain_errors

WORDS = [text.split() for text in ("# of adenomatous polyposis coli in New York", "the gene of # Acme Inc . binds")]


def tagged(template: str, *tags: str, copies: int = 20) -> str:
    """Sentences of columns by a template with {number}, {word} and {tag}; a word of its own ends each."""
    sentences = []
    for copy in range(copies):
        for words, of_words in zip(WORDS, tags, strict=True):
            rows = zip([*words, f"w{copy}"], [*of_words.split(), of_words.split()[0]], strict=True)
            sentences.append([template.format(number=n, word=w, tag=t) for n, (w, t) in enumerate(rows, start=1)])
    return "\n".join("".join(f"{row}\n" for row in rows) for rows in sentences)


def read(tmp_path, name: str, content: str, **changes):
    return load_task(make_config(write(tmp_path / name, content), **changes))


def refusal(tmp_path, name: str, content: str, **changes) -> str:
    with pytest.raises(UserError) as refused:
        read(tmp_path, name, content, **changes)
    said = str(refused.value)
    assert "\n" not in said and str(tmp_path / name) in said
    return said


# ------------------------------------------------------------------------------------------------------- tags of words

X, Y, Y6, Y7, ONE = ("X", 2, 4), ("Y", 6, 7), ("Y", 6, 6), ("Y", 7, 7), "entity"
SEGMENTS = [(ONE, 0, 0), (ONE, 1, 1), (ONE, 2, 4), (ONE, 5, 5), (ONE, 6, 7), (ONE, 8, 8)]
SCHEMES = {  # tags of WORDS as a file has them, and the entities of each sentence: kind, first and last word
    "BioBERT": ("O O B I I O O O", "O O O O B I O O", [(ONE, 2, 4)], [(ONE, 4, 5)]),
    "BIO": ("O O B-X I-X I-X O B-Y I-Y", "O O O O B-Y I-Y O O", [X, Y], [("Y", 4, 5)]),
    "IOB1": ("O O I-X I-X I-X O I-Y B-Y", "O O O O I-Y I-Y O O", [X, Y6, Y7], [("Y", 4, 5)]),
    "IO": ("O O X X X O Y Y", "O O O O Y Y O O", [X, Y], [("Y", 4, 5)]),
    "IO with 0": ("0 0 X X X 0 Y Y", "0 0 0 0 Y Y 0 0", [X, Y], [("Y", 4, 5)]),
    "BIO with 0": ("0 0 B-X I-X I-X 0 B-Y I-Y", "0 0 0 0 B-Y I-Y 0 0", [X, Y], [("Y", 4, 5)]),
    "BIOES": ("O O B-X I-X E-X O S-Y S-Y", "O O O O B-Y E-Y O O", [X, Y6, Y7], [("Y", 4, 5)]),
    "BILOU": ("O O B-X I-X L-X O U-Y U-Y", "O O O O B-Y L-Y O O", [X, Y6, Y7], [("Y", 4, 5)]),
    "BMES": ("O O B-X M-X E-X O S-Y S-Y", "O O O O B-Y E-Y O O", [X, Y6, Y7], [("Y", 4, 5)]),
    "BMEWO, kinds behind _": ("O O B_X M_X E_X O W_Y W_Y", "O O O O B_Y E_Y O O", [X, Y6, Y7], [("Y", 4, 5)]),
    "segmented words": ("S S B M E S B E", "S S B M E S B E", SEGMENTS, SEGMENTS),
}


@pytest.mark.parametrize("layout", ["ner.tsv {word}\t{tag}", "ner.txt {word} {tag}", "ner.conll {word} NN {tag}"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_of_tags_are_read_and_scored(tmp_path, scheme, layout):
    """By entities that were found by hand. Predicted is what the first sentence has, everywhere."""
    *tags, first, second = SCHEMES[scheme]
    name, _, template = layout.partition(" ")
    task = read(tmp_path, name, tagged(template, *tags))
    assert task.kind == "entities" and entity_types(task.classes) == sorted({kind for kind, *_ in first})
    tags_of, entities_of = {}, {tuple(WORDS[0]): {*first}, tuple(WORDS[1]): {*second}}
    for example in all_examples(task):
        assert {*get_entities(list(example.labels))} == entities_of[example.parts[:-1]]
        tags_of[example.parts[:-1]] = list(example.labels)

    predicted = tags_of[tuple(WORDS[0])] * len(task.test)
    counts = count_predictions(task, [task.classes.index(tag) for tag in predicted], task.test).sum(0)
    actual = [entities_of[example.parts[:-1]] for example in task.test]
    right = sum(len(entities & {*first}) for entities in actual)
    assert micro_f1(counts) == pytest.approx(2 * right / (len(first) * len(actual) + sum(map(len, actual))))


BIO, BIOBERT, IO = (SCHEMES[name][:2] for name in ("BIO", "BioBERT", "IO"))
COLUMNS = {
    "NeuroNLP2": ("ner.conll", tagged("{number} {word} NN I-NP {tag}", *BIO), "column 2, column 5"),
    "CoNLL-2003": ("ner.txt", "-DOCSTART- -X- -X- O\n\n" + tagged("{word} NN I-NP {tag}", *BIO), "column 1, column 4"),
    "numbers from 0": ("ner.bio", tagged("{number}\t{word}\t{tag}", *BIO), "column 2, column 3"),
    "an ending that is not known": ("eng.train", tagged("{word} {tag}", *BIO), "column 1, column 2"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_numbers_of_words_are_no_words(tmp_path, case):
    name, content, columns = COLUMNS[case]
    task = read(tmp_path, name, content)
    assert len(all_examples(task)) == 40 and entity_types(task.classes) == ["X", "Y"]
    assert {example.parts[:2] for example in all_examples(task)} == {tuple(words[:2]) for words in WORDS}
    assert task.read.startswith(columns)


COMMENTS = "#\thttp://example.org/a b [2009-10-17]", "# id 0a1b domain=en", "# sent_id = 12", "# text = the O", "###X:9"


@pytest.mark.parametrize("comment", COMMENTS)
def test_comments_before_a_sentence_are_left_out_and_the_word_is_not(tmp_path, comment):
    """GermEval's two columns of tags, of which the last is read."""
    rows = tagged("{number}\t{word}\tO\t{tag}", *BIO)
    task = read(
        tmp_path, "ner.tsv", "\n".join(f"{comment}\n{part}" for part in rows.split("\n\n")).replace("\n#", "\n\n#")
    )
    assert {example.parts[:2] for example in all_examples(task)} == {("#", "of"), ("the", "gene")}
    assert task.read.startswith("column 2, column 4 (not read: column 1, column 3); ")
    plain = "\n".join(f"{comment}\n{part}\n" for part in tagged("{word}\t{tag}", *BIO).split("\n\n"))
    task = read(tmp_path, "plain.conll", plain)
    assert len(all_examples(task)) == 40 and {example.parts[0] for example in all_examples(task)} == {"#", "the"}


@pytest.mark.parametrize("tags", ["OBIO", "OXXO", "0X0Y", "BIBM"])
def test_words_of_which_none_repeats_are_words(tmp_path, tags):
    rows = ["".join(f"word{n}x{place}\t{tag}\n" for place, tag in enumerate(tags)) for n in range(20)]
    assert read(tmp_path, "ner.tsv", "\n".join(rows)).kind == "entities"


def test_words_of_other_white_space_stay_words(tmp_path):
    task = read(tmp_path, "ner.txt", tagged("{word} {tag}", *BIO).replace("New", "\u3000"))
    assert any("\u3000" in example.parts for example in all_examples(task))


LISTS = [
    ([*words, f"w{n}"], [*tags.split(), "O"])
    for n in range(20) for words, tags in zip(WORDS, BIO, strict=True)
]  # fmt: skip


@pytest.mark.parametrize("keys", [("tokens", "ner_tags"), ("words", "labels"), ("text", "tags"), ("id", "ner")])
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_lists_of_words_and_tags(tmp_path, keys, ending):
    objects = [dict(zip(keys, lists, strict=True)) for lists in LISTS]
    content = json.dumps(objects, indent=1) if ending == "json" else "\n".join(map(json.dumps, objects))
    named = {"text_column": "id", "label_column": "ner"} if "id" in keys else {}
    task = read(tmp_path, f"t.{ending}", content, **named)
    assert task.kind == "entities" and entity_types(task.classes) == ["X", "Y"] and len(all_examples(task)) == 40


TABS, SPACES, NUMBERED = "{word}\t{tag}", "{word} {tag}", "{number}\t{word}\t{tag}"
WITH_RANGE = tagged(NUMBERED, *BIO).replace("\n2\t", "\n2-3\t", 1)
UNCLEAR = {
    "kinds of two forms": ("t.conll", "a B-X\nb X\n\nc B-X\nd I-X\n", "line 2 has the tag 'X'"),
    "places of two forms": ("t.conll", "a B-X\nb I\n\nc B-X\nd I-X\n", "line 2 has the tag 'I'"),
    "a tag that is none": ("t.tsv", tagged(TABS, *BIO) + "\nThe\tarticle\n", "line 401 has the tag 'article'"),
    "a title of kinds": ("t.tsv", "word\tTag\n" + tagged(TABS, *IO), "line 1 has the tag 'Tag'"),
    "a title": ("t.conll", "word\ttag\n" + tagged(TABS, *BIO), "line 1 has the tag 'tag'"),
    "places behind": ("t.conll", tagged(SPACES, "O O X-B X-I X-I O O O", "O " * 8), "line 3 has the tag 'X-B'"),
    "small letters": ("t.conll", tagged(SPACES, "o o b-x i-x i-x o o o", "o " * 8), "line 1 has the tag 'o'"),
    "parts of speech": ("t.conll", tagged(SPACES, "DT " * 8, "NN " * 8), "line 1 has the tag 'DT'"),
    "CoNLL-U": ("t.conll", tagged("{number}\t{word}\tNOUN\t_", "O " * 8, "O " * 8), "line 1 has the tag '_'"),
    "a range of CoNLL-U": ("t.conll", WITH_RANGE, "line 2 should hold a number, a word and a tag"),
    "numbers without words": ("t.conll", tagged("{number}\t{tag}", *BIO), "line 1 should hold a number, a word"),
    "a word of two": ("t.txt", tagged(SPACES, *BIO).replace("New", "New Y", 1), "line 7 should hold a word and a"),
    "no blank lines": ("t.tsv", tagged(TABS, *BIO).replace("\n\n", "\n"), "put a blank line between sentences"),
    "no blank lines, BioBERT": ("t.tsv", tagged(TABS, *BIOBERT).replace("\n\n", "\n"), "put a blank line"),
    "GermEval without inner tags": ("t.tsv", tagged(NUMBERED + "\tO", *BIO), "apart. Read: column 2, column 4 (not re"),
    "in a CSV": ("t.csv", tagged("{word},{tag}", *BIOBERT), "look like tags of words"),
    "kinds in a CSV": ("t.csv", tagged("{word},{tag}", *IO), "look like tags of words"),
    "numbers of tags": ("t.jsonl", '{"tokens": ["a"], "ner_tags": [3]}', "line 1 should have a list of words and"),
    "fewer tags": ("t.jsonl", '\n{"tokens": ["a"], "ner_tags": []}', "line 2 should have a list of words and"),
    "a list and a label": ("t.json", '[\n{"tokens": ["a"], "label": "b"}]', "line 2 should have a list of words"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_tags_that_cannot_be_scored_are_refused(tmp_path, case):
    name, content, said = UNCLEAR[case]
    assert said in refusal(tmp_path, name, content)


@pytest.mark.parametrize("classes", ["BM", "SML", "01", "BIE", "OS", "0123", "OPN", "ABO"])
def test_classes_of_one_letter_are_no_tags(tmp_path, classes):
    """Of texts without a space, such as Chinese titles, and with a blank line behind each."""
    rows = "".join(f"第{n}条标题\t{classes[n % len(classes)]}\n\n" for n in range(60))
    task = read(tmp_path, "t.txt", rows)
    assert task.kind == "text" and task.classes == sorted(classes)


# --------------------------------------------------------------------------------------------------------------- tables

ROWS = [(f"Gut, und; {n}", "ja" if n % 2 else "nein") for n in range(40)]
TABLES = {
    "semicolons.csv": "Satz;Label\n" + "".join(f'"{text}";{label}\n' for text, label in ROWS),
    "tabs.csv": "\ufefftext\tlabel\n" + "".join(f'"{text}"\t{label} \n' for text, label in ROWS),
    "pandas.csv": ",text,label\n" + "".join(f'{n},"{text}",{label}\n' for n, (text, label) in enumerate(ROWS)),
    "short-title.csv": "text,mood\n" + "".join(f'"{text}",{label}\n' for text, label in ROWS),
    "array.json": json.dumps([{"text": text, "label": label} for text, label in ROWS]),
    "printed.json": json.dumps([{"text": text, "label": label} for text, label in ROWS], indent=2),
    "UPPER.CSV": "TEXT,LABEL\n" + "".join(f'"{text}",{label}\n' for text, label in ROWS),
}
NAMED = {"semicolons.csv": {"text_column": "Satz"}, "short-title.csv": {"label_column": "mood"}}


@pytest.mark.parametrize("name", TABLES)
def test_tables_as_other_programs_write_them(tmp_path, name):
    task = read(tmp_path, name, TABLES[name], **NAMED.get(name, {}))
    assert sorted((example.parts[0], example.labels[0]) for example in all_examples(task)) == sorted(ROWS)


def rows_of(*columns: str, titles: str = "", number: int = 60) -> str:
    """A TSV whose columns are f-string-like templates of n."""
    rows = ["\t".join(column.format(n=n, few=n % 3, score=n % 26 / 5) for column in columns) for n in range(number)]
    return "\n".join([titles] * bool(titles) + rows) + "\n"


SCORES = rows_of("a {n}", "b {n}", "{score}", titles="sentence1\tsentence2\tscore")
TWO_TEXTS = rows_of("a {n}", "b {n}", "c{few}", titles="erster Satz\tzweiter\tUrteil")
TWO_TEXTS_AND_SCORES = rows_of("a {n}", "b {n}", "{score}", titles="s1\ts2\tUrteil", number=600)
NO_CLASSES = {
    "STS-B": (SCORES, "26 different labels for 60 texts, such as '0.2'; is the label in another column?"),
    "scores without titles": (rows_of("a {n}", "b {n}", "{score}", number=300), "no score (regression)"),
    "titles of two texts": (TWO_TEXTS, "--text_column 'erster Satz' --pair_column zweiter --label_column Urteil"),
    "titles of two texts and scores": (TWO_TEXTS_AND_SCORES, "--text_column s1 --pair_column s2 --label_column Ur"),
    "a decimal comma": (rows_of("a {n}", "{few},5"), "no score (regression)"),
    "numbers of several labels": (rows_of("a {n}", "2{few},1"), "no list of labels"),
    "a printed list": (rows_of("a {n}", "['x{few}', 'y']"), "['x0', 'y']"),
    "a text's name but no label's": ("text\tmood\na\tb\n", "label_column: "),
}


@pytest.mark.parametrize("case", NO_CLASSES)
def test_what_is_no_class_is_refused(tmp_path, case):
    content, said = NO_CLASSES[case]
    assert said in refusal(tmp_path, "t.tsv", content)


@pytest.mark.parametrize("label", [["b"], [[0, 3, "PER"]], {"name": {"a": [[0, 1]]}}])
def test_several_labels_of_an_object_are_refused_by_line(tmp_path, label):
    said = refusal(tmp_path, "t.json", json.dumps([{"text": "a", "label": label}] * 2, indent=0))
    assert "line 2 has a list or object; it should have one text and one label" in said


def test_numbers_that_are_classes_stay_classes(tmp_path):
    assert read(tmp_path, "whole.tsv", rows_of("a {n}", "{few}")).classes == ["0", "1", "2"]
    assert read(tmp_path, "pandas.tsv", rows_of("a {n}", "{few}.0")).classes == ["0.0", "1.0", "2.0"]
    assert read(tmp_path, "names.tsv", rows_of("a {n}", "v{few}.5")).classes == ["v0.5", "v1.5", "v2.5"]


@pytest.mark.parametrize("name", ["t.parquet", "t.xlsx"])
def test_binary_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"PAR1\x15\x04\x00\x8c" + bytes(40))
    with pytest.raises(UserError, match=rf"task: .*{name}, line 1 is not UTF-8; it looks like a binary file"):
        load_task(make_config(tmp_path / name))


# ------------------------------------------------------------------------------------------------------------- a folder


def folder(tmp_path, *names: str):
    tmp_path.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        write(tmp_path / "task" / name, "".join(f"{text} {number}\t{label}\n" for text, label in ROWS[:20]))
    return make_config(tmp_path / "task")


@pytest.mark.parametrize("dev", ["val.tsv", "devel.tsv", "valid.txt", "eval.tsv", "Validation.TSV", "dev.tsv"])
def test_dev_by_any_of_its_names(tmp_path, dev):
    task = load_task(folder(tmp_path, "train.tsv", dev, "test.tsv", "train_dev.tsv", "README.md"))
    assert [len(getattr(task, split)) for split in SPLITS] == [20, 20, 20]
    assert {example.parts[0][-2:] for example in task.dev} == {" 1"}
    sources = f"train from train.tsv, dev from {dev}, test from test.tsv"
    assert task.read == f"column 1, column 2; {sources} (not read: README.md, train_dev.tsv)"


@pytest.mark.parametrize(
    "other", ["train_dev.tsv", "dev_matched.tsv", "validation-00000-of-00001.parquet", "my.val.csv", "dev"]
)
def test_dev_is_not_drawn_where_a_file_may_be_meant(tmp_path, other):
    with pytest.raises(UserError, match=rf"has no dev file, .* it holds .*{other}.*\. Name them so"):
        load_task(folder(tmp_path, "train.tsv", "test.tsv", other))
    with pytest.raises(UserError, match=r"has no dev and no test and no train file"):
        load_task(folder(tmp_path / "without", other))


def test_all_that_a_file_was_taken_for_is_one_line(tmp_path):
    first = describe_task(load_task(folder(tmp_path, "train.tsv", "test.tsv", ".hidden"))).splitlines()[0]
    assert first == (
        "task: texts of 2 classes (ja, nein); 18 to train on, 2 to choose settings by (dev), 20 to test on; "
        "read: column 1, column 2; train from train.tsv, dev from train, test from test.tsv"
    )
    task = read(tmp_path, "ner.tsv", tagged("{word}\t{tag}", *BIOBERT))
    first = describe_task(task).splitlines()[0]
    assert first.startswith("ner: sentences with entities of 1 class (entity); 28 to train on, ")
    assert first.endswith("column 1, column 2; train, dev and test drawn from ner.tsv")


def test_a_refusal_is_one_line_with_status_2_and_makes_nothing(tmp_path, capsys):
    path = write(tmp_path / "t.tsv", NO_CLASSES["STS-B"][0])
    with pytest.raises(SystemExit) as ended, plain_errors():
        downstream.load_task(make_config(path, path_model_save=str(tmp_path / "output")))
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert [*tmp_path.iterdir()] == [path]
