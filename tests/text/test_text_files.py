"""Law 2: no text is lost. Law 8: unreadable text is said plainly, with file and line."""

import bz2
import codecs
import gzip
import hashlib
import lzma
import math
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet
from texts import make_lines
from transformers import BertTokenizer

from data_process import prepare, training_batches
from mlm.data import preparation
from mlm.data.chunks import cut_line, take
from mlm.data.masking import BERT_RULE
from mlm.data.packing import pack
from mlm.data.text_stats import TextStats, histogram, text_warnings
from mlm.data.tokenizer import learn_tokenizer, read_vocabulary
from mlm.errors import UserError
from mlm.storage import digest
from mlm.text.files import find_text
from mlm.text.lines import read_lines, read_sample


def stored_tokens(tmp_path, settings, text, tokenizer, vocabulary, **changes):
    config = settings(path_model_save=str(tmp_path / "output"), **changes)
    return prepare(config, text, tokenizer, vocabulary)


def test_lines_end_only_at_newlines(tmp_path):
    path = tmp_path / "train.txt"
    path.write_bytes("\ufeffone\r\ntwo\u2028still two\n\nlone\rreturn\x85next\nlast".encode())
    assert list(read_lines([path])) == ["one", "two\u2028still two", "", "lone\rreturn\x85next", "last"]


def test_gzip_and_many_files_in_name_order(tmp_path, settings):
    (tmp_path / "train-b.txt").write_text("b1\nb2")
    with gzip.open(tmp_path / "train-a.txt.gz", "wt") as file:
        file.write("a1\n")
    (tmp_path / "test.txt").write_text("t\n")
    text = find_text(settings(path_datasets=str(tmp_path)))
    assert sorted(text.train()) == ["a1", "b1", "b2"]
    assert list(text.test()) == ["t"]


RUSSIAN = "Пациенту назначили метформин и инсулин. Уровень сахара в крови снизился через три месяца.\n"
SAMPLES = {
    "cp1251": RUSSIAN,
    "koi8_r": RUSSIAN,
    "gbk": "患者服用二甲双胍治疗糖尿病和高血压，医生随访三个月后血糖下降明显。未观察到不良反应。\n",
    "big5": "患者服用二甲雙胍治療糖尿病和高血壓，醫生隨訪三個月後血糖下降明顯。未觀察到不良反應。\n",
    "shift_jis": "患者にメトホルミンを投与した。三か月後に血糖値が低下した。副作用は認められなかった。\n",
    "euc_jp": "患者にメトホルミンを投与した。三か月後に血糖値が低下した。副作用は認められなかった。\n",
    "euc_kr": "환자에게 메트포르민과 인슐린을 투여하였다. 삼 개월 후 혈당이 감소하였다.\n",
    "cp1253": "Ο ασθενής έλαβε μετφορμίνη και ινσουλίνη. Το σάκχαρο μειώθηκε μετά από τρεις μήνες.\n",
    "cp1255": "המטופל קיבל מטפורמין ואינסולין. רמת הסוכר בדם ירדה לאחר שלושה חודשי טיפול.\n",
    "cp1256": "تم إعطاء المريض الميتفورمين والأنسولين. انخفض مستوى السكر في الدم بعد ثلاثة أشهر.\n",
    "cp874": "ผู้ป่วยได้รับยาเมตฟอร์มินและอินซูลิน ระดับน้ำตาลในเลือดลดลงหลังจากสามเดือน\n",
    "cp1252": "Le patient a reçu de l’insuline. La glycémie a diminué ; aucun effet indésirable observé à ce jour.\n",
    "cp1250": "Pacjent otrzymał metforminę i insulinę. Stężenie glukozy we krwi obniżyło się po trzech miesiącach.\n",
    "cp1254": "Hastaya metformin ve insülin verildi. Üç ay sonra kan şekeri düştü; yan etki gözlenmedi, ağrı yoktu.\n",
    "utf_16": RUSSIAN,
}


def refusal(files: list, **how) -> str:
    with pytest.raises(UserError) as refused:
        list(read_lines(files, **how))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("times", [1, 40])
@pytest.mark.parametrize("encoding", SAMPLES)
def test_undecodable_bytes_name_file_line_and_encoding(tmp_path, encoding, times):
    """Where iconv is advised, it brings back the very text; languages of Latin letters cannot be told apart."""
    path = tmp_path / "train.txt"
    content = SAMPLES[encoding] * times
    path.write_bytes(content.encode(encoding))
    said = refusal([path])
    assert f"{path}, line 1 is not UTF-8" in said
    advised = re.search(r"iconv (-f \S+ -t UTF-8)", said)
    if encoding in ("cp1252", "cp1250", "cp1254"):
        assert "if its language is Western European, most likely with iconv -f WINDOWS-1252" in said
    elif encoding in ("cp1251", "gbk", "shift_jis", "cp1256", "cp1253", "utf_16"):  # which is surely recognised
        assert advised
    if advised and encoding not in ("cp1250", "cp1254"):
        converted = subprocess.run(["iconv", *advised[1].split(), path], capture_output=True, check=True)
        assert converted.stdout.decode() == content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04\x14\x00\x06\xff\n", "line 1 is not UTF-8; it looks like a binary file"),
        (b"PAR1\x15\x04\x15\xf0\n\x00\x00", "line 1 is not UTF-8; it looks like a binary file"),
        (b"caf\xe9 au lait\n", "line 1 is not UTF-8. Convert it: if its language is Western European"),
        (b"good\n\xfd\xfe\xf8\n", "line 2 is not UTF-8. Save it as plain UTF-8 text"),
    ],
)
def test_what_is_no_text_or_cannot_be_told_is_said_to_be_so(tmp_path, content, said):
    path = tmp_path / "train.txt"
    path.write_bytes(content)
    assert f"path_datasets: {path}, {said}" in refusal([path])


CHINESE_LINES = "二甲双胍可降低肝糖输出。\n".encode()
FRENCH_LINES = "Le patient a reçu de l’insuline, et sa glycémie a diminué.\n".encode()


@pytest.mark.parametrize(
    ("content", "line", "byte"),
    [
        ((CHINESE_LINES * 1000)[:-2], 1000, 34),  # as head -c and split -b cut
        (CHINESE_LINES[1:] + CHINESE_LINES * 9, 1, 1),
        (FRENCH_LINES + b"caf\xe9\n" + FRENCH_LINES * 3, 2, 4),
        (FRENCH_LINES + b"plain\n" * 9 + b"a flipped \xff byte\n" + b"plain\n" * 9, 11, 11),
        (codecs.BOM_UTF8 + RUSSIAN.encode()[:-3] + b"\n" + RUSSIAN.encode(), 1, 3 + len(RUSSIAN.encode()) - 3),
        (b"great \xed\xa0\xbd\xed\xb8\x80\nplain\n", 1, 7),
        (FRENCH_LINES + b"\xed\xa0\xbd\xed\xb8\x80 \xed\xa0\xbd\xed\xb8\x82\n" * 500, 2, 1),
        ("é ".encode() * 100_000 + b"\xff " + "é ".encode() * 100_000, 1, 300_001),
    ],
)
def test_a_damaged_character_in_utf_8_is_not_another_encoding(tmp_path, content, line, byte):
    """What is advised, iconv -c, leaves all that is whole."""
    path = tmp_path / "train.txt"
    path.write_bytes(content)
    said = refusal([path])
    assert re.search(rf"train\.txt, line {line} is UTF-8 but for an? .+ at byte {byte}\. Remove the line, or", said)
    assert ("surrogates" in said) == (b"\xed\xa0\xbd" in content)
    command = re.search(r"iconv -c -f UTF-8 -t UTF-8", said)[0].split()
    cleaned = subprocess.run([*command, path], capture_output=True).stdout  # its status is 1: it left something out
    assert cleaned.decode() == SURROGATE.sub(b"", content).decode(errors="ignore")
    path.write_bytes(cleaned)
    assert list(read_lines([path]))


SURROGATE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")


def test_text_of_two_encodings_is_not_converted_as_a_whole(tmp_path):
    path = tmp_path / "train.txt"
    path.write_bytes(FRENCH_LINES * 3 + SAMPLES["cp1251"].encode("cp1251") * 3)
    said = refusal([path])
    assert "line 4 is not UTF-8, as lines above it are; it looks like WINDOWS-1251. Convert it by itself" in said
    assert "iconv" not in said


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_packed_text_is_read_and_said_plainly_where_broken(tmp_path, ending):
    lines = [f"line {number}" for number in range(1000)]
    packed = pack_bytes("\n".join(lines).encode(), ending)
    path = tmp_path / f"train.TXT.{ending.upper()}"
    path.write_bytes(packed)
    assert list(read_lines([path])) == lines
    for content in (b"not packed at all", packed[: len(packed) // 2]):
        path.write_bytes(content)
        assert f"path_datasets: cannot read {path}" in refusal([path])


def pack_bytes(content: bytes, ending: str) -> bytes:
    packers = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    return pa.compress(content, "zstd", asbytes=True) if ending == "zst" else packers[ending](content)


def test_held_out_lines_are_exact_seeded_and_never_on_both_sides(tmp_path, settings):
    lines = [f"line {i % 150}" for i in range(300)]  # every line twice
    (tmp_path / "train.txt").write_text("\n".join(lines))
    splits = {}
    for seed in (1, 1, 2):
        text = find_text(settings(path_datasets=str(tmp_path), test_fraction=0.1, seed=seed))
        train, test = list(text.train()), list(text.test())
        assert len(set(test)) == 15 and len(test) == 30
        assert not set(train) & set(test)
        assert Counter(train + test) == Counter(lines)
        assert splits.setdefault(seed, test) == test
    assert splits[1] != splits[2]


def test_one_line_cannot_be_split(tmp_path, settings):
    (tmp_path / "train.txt").write_text("only\n\nonly\n")
    with pytest.raises(UserError, match=r"holds one line only"):
        find_text(settings(path_datasets=str(tmp_path)))


TEXTS = ['the patient, "he" said', "二甲双胍", "two\nlines", "", "  last one "]
READ = [
    'the patient, "he" said',
    "二甲双胍",
    "two lines",
    "",
    "last one",
]  # a line feed is white space, and an end stripped


INSTEAD = "there is no test file, so the model is evaluated on"


def write_table(path, texts=TEXTS, column="text"):
    """By pandas, from whatever ending the name has."""
    frame = pd.DataFrame({"id": range(len(texts)), column: texts})
    name = path.name.lower()
    if ".csv" in name:
        frame.to_csv(path, index=False)
    elif ".tsv" in name:  # which has no quotes, and no line feeds in a cell
        path.write_text("\n".join(f"{row[0]}\t" + row[1].replace("\n", " ") for row in [frame.columns, *frame.values]))
    elif ".parquet" in name:
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True, force_ascii=False)


def find(folder, settings, **changes):
    return find_text(settings(path_datasets=str(folder), **changes))


@pytest.mark.parametrize(
    "name", ["train.jsonl", "Train-1.JSON", "train.ndjson", "train.csv", "train.tsv", "train.parquet"]
)
@pytest.mark.parametrize("column", ["text", "abstract"])
def test_tables_are_read_a_text_a_row(tmp_path, settings, name, column):
    folder = tmp_path / "tables"
    folder.mkdir()
    write_table(folder / name, column=column)
    write_table(folder / "test.csv", ["tested"], column)
    text = find(folder, settings, text_column=column)
    assert list(text.train()) == READ and list(text.test()) == ["tested"] and not text.notes


@pytest.mark.parametrize(
    "names",
    [
        ["train.TXT"], ["train.txt.xz"], ["Train.Txt.GZ"], ["train/part-0.txt", "train/part-1.txt"],
        ["train-en/a.txt", "train-zh/deep/b.txt.bz2"], ["train.jsonl.gz"], ["train.csv.zst"], ["train/0.parquet"],
    ],
)  # fmt: skip
def test_text_under_many_names_is_read(tmp_path, settings, names):
    """Half of it is held out, so that both splits are read from there."""
    folder = tmp_path / "corpus"
    expected = []
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"line {number} {line}" for line in range(20)]
        expected += lines
        *_, ending = path.name.lower().split(".")
        if ending in ("gz", "xz", "bz2", "zst"):
            whole = path.with_name(path.stem)
            write_table(whole, lines) if "json" in name or "csv" in name else whole.write_text("\n".join(lines))
            path.write_bytes(pack_bytes(whole.read_bytes(), ending))
            whole.unlink()
        else:
            write_table(path, lines) if ending == "parquet" else path.write_text("\n".join(lines))
    (folder / "README.md").write_text("about it")
    (folder / ".DS_Store").write_bytes(b"\x00")
    text = find(folder, settings, test_fraction=0.5)
    assert sorted([*text.train(), *text.test()]) == sorted(expected) and not text.notes


BAD_TABLES = {
    "train.jsonl": [
        ('{"text": "a"}\n{"text": 5}\n', "line 2: text is 5, not a string"),
        ('{"text": "a"}\n{"text": ["b"]}\n', r"line 2: text is \['b'\], not a string"),
        ('{"text": "a"}\n\n{"body": "b", "id": 1}\n', "line 3 has no column text, but body, id"),
        ('{"text": "a"\n', r"line 1 is not JSON by itself: .* A line should hold one object"),
        ('[\n{"text": "a"},\n{"text": "b"}\n]\n', r"line 1 is not JSON by itself: .*jq -c \.\[\]"),
        ('[{"text": "a"}, {"text": "b"}]\n', r"line 1 is no object.*jq -c \.\[\]"),
        ('"a"\n', "line 1 is no object"),
        ('{"text": "\\ud83d"}\n', "line 1 holds half a character"),
        ("[" * 100_000, "line 1 is not JSON by itself"),
    ],
    "train.csv": [
        ("id,body\n1,a\n", r"line 1 has no column text, but id, body\..*text_column"),
        ("id;text\n1;a\n", r"line 1 has no column text, but id;text\..*A comma separates columns in \.csv"),
        ("id,text\n1,a, b\n", "line 2 has 3 .* and line 1 has 2; a text with a comma must stand in quotes"),
        ('id,text\n1,"a\nb"\n2\n', "line 4 has 1 column"),
        ('id,text\n1,a\n2,"b\n3,c\n', "the row that begins in line 3 is not CSV"),
        ('id,text\n1,"a" b\n', "the row that begins in line 2 is not CSV"),
        ("", "is empty"),
    ],
    "train.tsv": [
        ("text,id\na,1\n", r"line 1 has no column text, but text,id\..*A tab separates"),
        ("text\tid\na\tb\tc\n", "line 2 has 3 .* must not hold a tab"),
    ],
    "train.parquet": [("no parquet", "cannot be read as Parquet from row 1 on"), ("", "cannot be read as Parquet")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "said"), [(name, *case) for name, cases in BAD_TABLES.items() for case in cases]
)
def test_tables_that_cannot_be_read_name_file_and_place(tmp_path, settings, name, content, said):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"^path_datasets: .*{name}.*{said}") as refused:
        find(folder, settings)
    assert "\n" not in str(refused.value)


def test_parquet_of_other_columns_and_types_is_refused_by_row(tmp_path, settings):
    folder = tmp_path / "bad"
    folder.mkdir()
    for frame, said in (
        (pd.DataFrame({"body": ["a"]}), "has no column text, but body"),
        (pd.DataFrame({"text": [1, 2]}), "row 1: text is 1, not a string"),
        (pd.DataFrame({"text": [["a"], ["b"]]}), "row 1: text is ."),
    ):
        frame.to_parquet(folder / "train.parquet")
        with pytest.raises(UserError, match=said):
            find(folder, settings)
    offsets = pa.py_buffer(np.array([0, 1, 2], dtype=np.int32).tobytes())
    bad_utf8 = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff")])
    parquet.write_table(pa.table({"text": bad_utf8}), folder / "train.parquet")
    with pytest.raises(UserError, match=r"cannot be read as Parquet from row 2 on: .*utf-8"):
        find(folder, settings)


def test_nulls_are_blank_and_large_parquets_are_read_row_by_row(tmp_path, settings):
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": null}\n\n{"text": "a"}\n')
    texts = [None if number % 7 == 0 else f"row {number}" for number in range(5000)]
    pd.DataFrame({"text": texts}).to_parquet(folder / "test.parquet", row_group_size=1700)
    text = find(folder, settings)
    assert list(text.train()) == ["", "", "a"]
    assert list(text.test()) == [one or "" for one in texts]


def test_the_digest_depends_on_all_that_decides_the_lines(tmp_path, settings):
    """And on plain text it is what it was before there were tables: runs and caches stay valid."""
    folder = tmp_path / "tables"
    folder.mkdir()
    row = '{"text": "a", "body": "b"}\n{"text": "c", "body": "d"}\n'
    found = {}
    for name in ("train.jsonl", "train.txt"):
        for column in ("text", "body"):
            (folder / name).write_text(row)
            (folder / "test.txt").write_text("t\n")
            found[name, column] = find(folder, settings, text_column=column).digest
            (folder / name).unlink()
    assert len(set(found.values())) == 3 and found["train.txt", "text"] == found["train.txt", "body"]
    contents = [[hashlib.blake2b(content).hexdigest()] for content in (row.encode(), b"t\n")]
    assert found["train.txt", "text"] == digest(contents)


@pytest.mark.parametrize(
    ("names", "tested", "notes"),
    [
        (["valid.txt"], "valid.txt", [f"{INSTEAD} valid.txt"]),
        (["dev.txt", "dev-2.txt"], "dev-2.txt", [f"{INSTEAD} dev-2.txt, dev.txt"]),
        (["devel.csv"], "devel.csv", [f"{INSTEAD} devel.csv"]),
        (["Validation/a.txt"], "Validation/a.txt", [f"{INSTEAD} Validation/a.txt"]),
        (["test.txt", "eval.txt"], "test.txt", ["not read in FOLDER: eval.txt"]),
        (["test.txt", "val.csv", "notes.docx"], "test.txt", ["not read in FOLDER: notes.docx, val.csv"]),
        (["devices.txt", "value.txt"], None, ["not read in FOLDER: devices.txt, value.txt"]),
        (["train.jsonl", "train/0.txt", "old/x.txt"], None, ["not read in FOLDER: old/, train.jsonl, train/0.txt"]),
        (["test.txt", *"abcdefg"], "test.txt", ["not read in FOLDER: a, b, c, d, e, 2 more"]),
        (["README.md", "readme.txt", ".hidden.txt"], None, []),
    ],
)  # fmt: skip
def test_what_lies_beside_the_training_text_is_read_or_named(tmp_path, settings, names, tested, notes):
    folder = tmp_path / "corpus"
    for name in ["train.txt", *names]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_table(folder / name, [name, "more"]) if "csv" in name else (folder / name).write_text(f"{name}\nmore\n")
    text = find(folder, settings)
    assert [note.replace(str(folder), "FOLDER") for note in text.notes] == notes
    if tested:
        assert list(text.train()) == ["train.txt", "more"] and next(text.test()) == tested
    else:
        assert sorted([*text.train(), *text.test()]) == ["more", "train.txt"]


@pytest.mark.parametrize(
    ("names", "evaluate_only", "said"),
    [
        ([], False, r"no train\*\.txt in \S+, which holds nothing to read\. Put your text there"),
        (["test.txt"], False, r"no train\*\.txt in \S+, which holds test\.txt\."),
        (["corpus.txt", "train.docx"], False, r"which holds corpus\.txt, train\.docx\..* train\*\.jsonl, \.csv"),
        (["train.gz", "train.parquet.gz"], False, r"which holds train\.gz, train\.parquet\.gz\."),
        (["notes/a.txt"], False, r"which holds notes/\."),
        (["a.md"], True, r"no test\*\.txt in \S+, which holds a\.md\."),
        (None, False, "is no folder"),
    ],
)
@pytest.mark.parametrize("is_default", [True, False])
def test_missing_text_is_said_by_what_lies_there(
    tmp_path, settings, monkeypatch, names, evaluate_only, said, is_default
):
    """In the default folder too: WikiText-2 is fetched where there is nothing but a README."""
    monkeypatch.chdir(tmp_path)
    folder = Path("data" if is_default else "corpus")
    for name in names or ():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("t")
    if names == []:
        folder.mkdir()
        (folder / "README.md").write_text("put text here")
    fetched = []
    monkeypatch.setattr("mlm.text.files._fetch_wikitext", fetched.append)
    with pytest.raises(UserError, match=said) as refused:
        find(folder, settings, evaluate_only=evaluate_only)
    assert "\n" not in str(refused.value)
    assert fetched == ([folder] if is_default and not names else [])


def test_only_dev_serves_to_evaluate_only(tmp_path, settings):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "dev.jsonl").write_text('{"text": "a"}\n')
    text = find(folder, settings, evaluate_only=True)
    assert list(text.test()) == ["a"] and text.notes


def test_a_file_in_place_of_the_folder_is_said_plainly(settings, text_folder):
    with pytest.raises(UserError, match=r"train\.txt is a file; give the folder"):
        find_text(settings(path_datasets=str(text_folder / "train.txt")))


@pytest.mark.parametrize("sen_max_length", [3, 8, 32])
def test_every_token_of_every_line_exactly_once_an_epoch(
    tmp_path, settings, text_of, tokenizer, vocabulary, sen_max_length
):
    lines = [*make_lines(100, seed=3), "", "\x00\x01", "[MASK] is text, and so is [SEP]", "word" * 40, "a " * 1000]
    text = text_of(tmp_path, "\n".join(lines).encode())
    train, _, found = stored_tokens(tmp_path, settings, text, tokenizer, vocabulary, sen_max_length=sen_max_length)
    # The reference tokenizes line by line, through the public call, with special tokens split as text.
    expected = Counter()
    for line in lines:
        expected.update(tokenizer(line, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    seen = Counter()
    steps = training_batches(train, vocabulary, BERT_RULE, 7, 16)
    for _ in range(math.ceil(len(train) / 16)):
        batch = pack(next(steps), 64, vocabulary)
        batch.input_ids.reshape(-1)[batch.label_positions] = batch.targets
        seen.update(batch.input_ids[batch.segment_ids > 0].tolist())
    assert seen.pop(vocabulary.cls_id) == seen.pop(vocabulary.sep_id) == len(train)
    assert seen == expected
    assert vocabulary.mask_id not in seen
    assert np.diff(train.offsets).max() == sen_max_length - 2
    assert found.train.blank == 1 and found.train.dropped == 1
    assert found.train.tokens == expected.total() and found.train.chunks == len(train)


def test_chunks_of_a_line_join_to_the_line_and_start_at_words(tmp_path, settings, text_of, tokenizer, vocabulary):
    line = " ".join(make_lines(50, seed=4))
    train, _, _ = stored_tokens(tmp_path, settings, text_of(tmp_path, line.encode()), tokenizer, vocabulary)
    tokens, lengths, _ = take(train, np.arange(len(train)))
    assert tokens.tolist() == tokenizer(line, add_special_tokens=False)["input_ids"]
    starts = np.cumsum(lengths) - lengths
    assert not any(token.startswith("##") for token in tokenizer.convert_ids_to_tokens(tokens[starts].tolist()))


@pytest.mark.parametrize(
    ("starts_word", "limit", "lengths"),
    [
        ("", 3, []),
        ("1", 3, [1]),
        ("111", 3, [3]),
        ("1111", 3, [3, 1]),
        ("110010", 3, [1, 3, 2]),  # a word of three subwords moves whole to the next chunk
        ("1000000", 3, [3, 3, 1]),  # one word longer than a chunk is cut inside
        ("1100000", 3, [1, 3, 3]),
    ],
)
def test_cut(starts_word, limit, lengths):
    assert cut_line(np.array([c == "1" for c in starts_word], dtype=bool), limit) == lengths


def test_a_megabyte_line_is_kept_whole(tmp_path, settings, text_of, tokenizer, vocabulary):
    line = "the patient was given insulin " * 35_000
    train, _, found = stored_tokens(tmp_path, settings, text_of(tmp_path, line.encode()), tokenizer, vocabulary)
    assert len(line) > 1_000_000
    expected = len(tokenizer("the patient was given insulin", add_special_tokens=False)["input_ids"]) * 35_000
    assert found.train.tokens == len(train.tokens) == expected


def test_what_was_found_counts_lines(tmp_path, settings, text_of, tokenizer, vocabulary):
    train = b"the patient\nthe patient\n\nthe doctors\n\x00\nQ\n"
    text = text_of(tmp_path, train, b"the patient\nnew line\n")
    _, _, found = stored_tokens(tmp_path, settings, text, tokenizer, vocabulary)
    expected = {"lines": 6, "blank": 1, "duplicate": 1, "dropped": 1}
    assert expected.items() <= vars(found.train).items()
    assert found.test_lines_in_train == 1
    ids = tokenizer("Q", add_special_tokens=False)["input_ids"]
    assert found.train.unknown == ids.count(tokenizer.unk_token_id)


def words_of(*words: str, lower_case: bool = False) -> BertTokenizer:
    """A tokenizer that has these words."""
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    return BertTokenizer(vocab={word: index for index, word in enumerate(entries)}, do_lower_case=lower_case)


@pytest.mark.parametrize(
    ("made", "line", "cause", "said"),
    [
        (words_of("the", "##a", "a"), "the " + "a" * 101, "long", "100% words of more than 100 characters"),
        (words_of("the", "patient", "große"), "The Patient Großé", "lower case", '"do_lower_case": true in'),
        (words_of("The", "Patient", lower_case=True), "The Patient", "capitals", '"do_lower_case": false in'),
        (words_of("the"), "the пациент", "CYRILLIC", "Cyrillic letters that it lacks, so it is most likely for"),
        (words_of("the"), "患者 the", "CJK", "initial_pretrain_tokenizer to bert-base-chinese"),
        (words_of("the"), "the 😀 →", "sign", "100% signs, such as emoji, that it lacks"),
        (words_of("the", "t"), "the tt", "pieces", "100% words that no tokens of it make up"),
    ],
)
def test_unknown_tokens_are_blamed_on_what_makes_them_so(tmp_path, settings, text_of, made, line, cause, said):
    text = text_of(tmp_path, f"{line}\n".encode() * 30, b"the The\n")
    _, _, found = stored_tokens(tmp_path, settings, text, made, read_vocabulary(made))
    counted = found.train.unknown_causes
    assert counted.keys() == {cause}
    assert counted[cause] == found.train.unknown  # 30 short lines are all of them in the sample
    [warning, *_] = text_warnings(found, "some/bert", only_test=False)
    assert ". Of a sample, seen by the vocabulary of some/bert: " in warning
    assert said in warning and ("another language" in warning) == (cause in ("CYRILLIC", "CJK"))
    assert "another language" not in text_warnings(found, "corpus", only_test=False)[0]


def test_few_unknown_tokens_of_a_kind_are_not_named_and_old_runs_have_no_kinds(tmp_path, settings, text_of):
    made = words_of("the")
    text = text_of(tmp_path, ("😀 " * 9 + "б the\n").encode() * 5, b"the\n")
    _, _, found = stored_tokens(tmp_path, settings, text, made, read_vocabulary(made))
    assert found.train.unknown_causes == {"sign": 45, "CYRILLIC": 5}
    [warning] = text_warnings(found, "some/bert", only_test=False)
    assert "90% signs" in warning and "Cyrillic" not in warning
    old = asdict(found)
    for split in ("train", "test"):
        del old[split]["unknown_causes"]
    assert text_warnings(TextStats.from_dict(old), "some/bert", False) == ["warning: 91% of the train tokens are [UNK]"]


def test_text_without_a_token_is_said_plainly(tmp_path, settings, text_of, tokenizer, vocabulary):
    with pytest.raises(UserError, match=r"no line of train\* holds a token"):
        stored_tokens(tmp_path, settings, text_of(tmp_path, b"\x00\n\n"), tokenizer, vocabulary)
    left = [path.name for path in (tmp_path / "output" / ".cache").iterdir() if path.suffix != ".lock"]
    assert [name.partition("-")[0] for name in left] == ["lines"]  # what is known of the lines, and nothing begun


def test_prepared_text_is_found_again_and_keyed_by_what_decides_it(
    tmp_path, settings, text_of, tokenizer, vocabulary, monkeypatch
):
    text = text_of(tmp_path, b"the patient was given insulin\n")

    def forbidden(*arguments):
        raise AssertionError("the text was tokenized again")

    first, _, _ = stored_tokens(tmp_path, settings, text, tokenizer, vocabulary)
    monkeypatch.setattr(preparation, "cut_lines", forbidden)
    again, _, _ = stored_tokens(tmp_path, settings, text, tokenizer, vocabulary)
    assert np.array_equal(first.tokens, again.tokens)
    with pytest.raises(AssertionError):
        stored_tokens(tmp_path, settings, text, tokenizer, vocabulary, sen_max_length=16)
    other = learn_tokenizer(lambda: iter(["insulin"]), 50)
    with pytest.raises(AssertionError):
        stored_tokens(tmp_path, settings, text, other, read_vocabulary(other))


def test_unigram_perplexity_counts_every_test_token(tmp_path, settings, text_of, tokenizer, vocabulary):
    text = text_of(tmp_path, b"the the patient", b"the patient patient\n")
    _, _, found = stored_tokens(tmp_path, settings, text, tokenizer, vocabulary)
    counts = Counter(tokenizer("the the patient", add_special_tokens=False)["input_ids"])
    test = tokenizer("the patient patient", add_special_tokens=False)["input_ids"]
    total = counts.total() + vocabulary.size
    expected = np.exp(-np.mean([np.log((counts[token] + 1) / total) for token in test]))
    assert found.unigram_perplexity == pytest.approx(expected)


def test_lines_are_counted_by_their_tokens(tmp_path, settings, tokenizer, text_of):
    """Of 1, 2, 15, 30 and 31 tokens, where 30 fit a chunk: 15 bins of two, and one for those too long."""
    lines = ["the " * tokens for tokens in (1, 2, 2, 15, 30, 31, 90)]
    text = text_of(tmp_path, "\n".join(lines).encode())
    *_, stats = prepare(settings(), text, tokenizer, read_vocabulary(tokenizer))
    counts = histogram(stats.train, sen_max_length=32)
    assert [label for label, _ in counts] == [f"{first} to {first + 1}" for first in range(1, 30, 2)] + ["over 30"]
    assert [number for _, number in counts] == [3, *[0] * 6, 1, *[0] * 6, 1, 2]
    assert sum(number for _, number in counts) == len(lines)


@pytest.mark.parametrize("lines", [1, 2, 1999, 2000, 2001, 3999, 4001])
def test_a_sample_is_spread_over_the_whole_file(tmp_path, lines):
    (tmp_path / "a.txt").write_text("\n\n".join(map(str, range(lines))))
    sample = [int(line) for line in read_sample(tmp_path / "a.txt", "general_text", 2000)]
    assert len(sample) == min(lines, 2000) and sample == sorted(set(sample))
    assert (sample[0], sample[-1]) == (0, lines - 1)
    assert max(np.diff(sample), default=0) <= math.ceil(lines / 2000) + 1


@pytest.mark.parametrize(
    ("content", "is_old"), [(b"a\rb\rc", True), (b"a\rb\r", True), (b"a\r", False), (b"a\rb\n", False)]
)
def test_a_file_whose_lines_end_in_carriage_returns_is_said_to_be_so(tmp_path, content, is_old):
    (tmp_path / "train.txt").write_bytes(content)
    if is_old:
        with pytest.raises(UserError, match=r"train.txt is one line, as its lines end in \\r alone"):
            list(read_lines([tmp_path / "train.txt"]))
    else:
        assert len(list(read_lines([tmp_path / "train.txt"]))) == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_no_file_is_removed_while_it_is_mapped_into_memory(settings, tokenizer, vocabulary, monkeypatch):
    """Which Windows refuses."""
    removed, rmtree = [], shutil.rmtree

    def look_and_remove(path, **options):
        removed.append(path)
        assert f"{path}/" not in Path("/proc/self/maps").read_text()
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", look_and_remove)
    config = settings()
    prepare(config, find_text(config), tokenizer, vocabulary)
    assert {path.suffix for path in removed if path.is_absolute()} >= {".parts"}
