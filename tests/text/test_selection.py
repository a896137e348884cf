"""Units and what is chosen of them: every line once, held-out and equal lines exactly, whatever is held at once."""

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies
from runs import run

from Config import Config
from mlm.errors import UserError
from mlm.randomness import line_keys
from mlm.text import selection, units
from mlm.text.files import find_text, without_training_text
from mlm.text.lines import decode_lines, read_lines
from mlm.text.selection import hash_lines
from mlm.text.units import cut_into_units, read_blocks

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LINES = strategies.lists(strategies.sampled_from(["a", "b", "c", "", " d", "e f", "a long line of words"]), max_size=40)
ENDS = strategies.sampled_from(["\n", "\r\n"])


@pytest.fixture
def little(monkeypatch):
    """Units of 30 bytes, and hashes of a few lines at once."""
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", 30)
    monkeypatch.setattr(units, "BLOCK_CHARACTERS", 12)
    monkeypatch.setattr(selection, "RUN_LINES", 3)
    monkeypatch.setattr(selection, "BUCKET_LINES", 4)


def lines_of_units(files: dict[str, list[Path]], column: str = "text") -> list[str]:
    return list(chain.from_iterable(chain.from_iterable(read_blocks(unit, column) for unit in cut_into_units(files))))


@quick
@given(
    content=strategies.lists(strategies.sampled_from(["", "a", "xyz" * 20, "二甲双胍", "\r", " b "]), max_size=12),
    end=ENDS,
    is_marked=strategies.booleans(),
    ends_with_end=strategies.booleans(),
    unit_bytes=strategies.integers(1, 40),
)
def test_units_have_every_line_of_a_file_once(
    tmp_path, monkeypatch, content, end, is_marked, ends_with_end, unit_bytes
):
    path = tmp_path / "train.txt"
    text = end.join(content) + end * ends_with_end
    path.write_bytes(b"\xef\xbb\xbf" * is_marked + text.encode())
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", unit_bytes)
    try:
        whole = list(read_lines([path]))
    except UserError:  # one line with a lone \r in it
        with pytest.raises(UserError, match="is one line"):
            lines_of_units({"train": [path]})
        return
    assert lines_of_units({"train": [path]}) == whole


@pytest.mark.parametrize("name", ["train.txt.gz", "train.csv", "train.tsv", "train.parquet"])
def test_a_file_that_cannot_be_cut_is_one_unit(tmp_path, little, name):
    (tmp_path / name).write_bytes(b"x" * 1000)
    assert [unit[1:] for unit in cut_into_units({"train": [tmp_path / name]})] == [("train", 0, 1000)]


def test_how_a_text_is_cut_depends_on_its_size_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", 10)
    monkeypatch.setattr(units, "MOST_UNITS", 8)
    for name, size in (("a.txt", 100), ("b.txt", 25), ("c.txt", 0)):
        (tmp_path / name).write_bytes(b"x" * size)
    files = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    ranges = [unit[2:] for unit in cut_into_units({"train": files[:2], "test": files[2:]})]
    assert ranges == [(start, min(start + 15, 100)) for start in range(0, 100, 15)] + [(0, 15), (15, 25), (0, 0)]


@pytest.mark.parametrize("damaged", [1, 2, 40, 99, 100])
@pytest.mark.parametrize("kind", ["bytes", "json", "no string", "no column"])
def test_what_is_wrong_in_any_unit_is_said_with_the_line_of_the_file(tmp_path, little, kind, damaged):
    wrong = {"bytes": b"caf\xe9 au lait", "json": b"{text", "no string": b'{"text": 5}', "no column": b'{"other": ""}'}
    is_text = kind == "bytes"
    path = tmp_path / ("train.txt" if is_text else "train.jsonl")
    rows = [f"line {n} é".encode() if is_text else json.dumps({"text": f"line {n}"}).encode() for n in range(1, 101)]
    rows[damaged - 1] = wrong[kind]
    path.write_bytes(b"\n".join(rows) + b"\n")
    with pytest.raises(UserError, match=rf"^path_datasets: .*{path.name}, line {damaged}\b"):
        lines_of_units({"train": [path]})
    if is_text:
        with pytest.raises(UserError) as whole:
            list(decode_lines(path, "path_datasets"))
        with pytest.raises(UserError, match="UTF-8") as of_unit:
            lines_of_units({"train": [path]})
        assert str(of_unit.value).partition("line")[2][:30] == str(whole.value).partition("line")[2][:30]


def config_of(folder: Path, **changes) -> Config:
    return Config(path_datasets=str(folder), path_model_save=str(folder / "output"), **changes)


@quick
@given(train=LINES, test=LINES, end=ENDS)
def test_equal_lines_are_counted_and_dropped_exactly(little, train, test, end):
    with TemporaryDirectory() as name:
        folder = Path(name)
        for split, lines in (("train", train), ("test", test)):
            (folder / f"{split}.txt").write_bytes("".join(f"{line}{end}" for line in lines).encode())
        plain, dropping = (find_text(config_of(folder, drop_duplicates=drop)) for drop in (False, True))
        trained, tested = ([line.strip() for line in lines] for lines in (train, test))
        assert list(plain.train()) == trained and list(plain.test()) == list(dropping.test()) == tested

        filled = [list(filter(None, lines)) for lines in (trained, tested)]
        kept = list(dict.fromkeys(line for line in filled[0] if line not in tested))
        counts = plain.count_lines()
        left = counts._replace(train_lines=len(kept), train_distinct=len(kept), test_lines_in_train=0)
        assert dropping.count_lines() == left
        assert (counts.train_lines, counts.test_lines) == tuple(map(len, filled))
        assert (counts.train_distinct, counts.test_distinct) == tuple(len(set(lines)) for lines in filled)
        assert counts.test_lines_in_train == sum(line in filled[0] for line in filled[1])
        assert counts.removable == len(filled[0]) - len(kept)

        # The first of equal lines stays, in its place; blank lines are none of them.
        left = list(dropping.train())
        assert list(filter(None, left)) == kept and left.count("") == trained.count("")
        assert plain.digest != dropping.digest


@quick
@given(lines=LINES, share=strategies.sampled_from([0.01, 0.3, 0.9]), drop=strategies.booleans())
def test_the_share_that_is_held_out_is_exact(little, lines, share, drop):
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train.txt").write_text("\n".join(lines))
        distinct = {line.strip() for line in lines} - {""}
        config = config_of(folder, test_fraction=share, drop_duplicates=drop)
        if len(distinct) < 2:
            with pytest.raises(UserError, match="two lines are needed"):
                find_text(config)
            return
        text = find_text(config)
        train, test = ([line for line in found if line] for found in (text.train(), text.test()))
        assert len(set(test)) == min(max(1, round(share * len(distinct))), len(distinct) - 1)
        assert not set(train) & set(test) and set(train) | set(test) == distinct
        expected = Counter(line.strip() for line in lines if line.strip())
        kept = [line for line in dict.fromkeys(line.strip() for line in lines) if line in set(train)]
        assert train == kept if drop else Counter(train) + Counter(test) == expected
        assert Counter(test) == Counter({line: expected[line] for line in test})
        assert text.count_lines().test_lines_in_train == 0


def test_no_two_lines_have_the_same_key():
    hashes = np.concatenate([np.arange(100_000, dtype=np.uint64), hash_lines([str(n) for n in range(100_000)])])
    assert len(np.unique(hashes)) == len(np.unique(line_keys(7, hashes))) == 200_000


def test_lines_are_hashed_in_the_same_way_in_every_run():
    assert hash_lines(["", "a"]).tolist() == [13020603013274838756, 3405396810240292928]
    assert len(hash_lines([])) == 0


def test_evaluating_alone_reads_no_training_text(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"\xff\xfe not text")
    (tmp_path / "test.txt").write_text("one\ntwo\none\n")
    text = without_training_text(find_text(config_of(tmp_path, evaluate_only=True)))
    assert list(text.train()) == list(text.test()) == ["one", "two", "one"]
    assert text.count_lines().test_lines == 3 and text.size_bytes == 12


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("repeats", [0, 7])
def test_a_run_says_what_is_left_out_or_would_be(request, tmp_path, capsys, drop, repeats):
    """Of 40 lines, so many more of which repeat the first one, and with the first test line among them."""
    folder = tmp_path / "equal"
    folder.mkdir()
    lines = [f"the patient was given {number} units" for number in range(40)]
    (folder / "test.txt").write_text("\n".join([*lines[30:], *lines[30:33]]))
    trained = [*lines[:30], *lines[:1] * repeats, *lines[30:31] * (repeats > 0)]
    (folder / "train.txt").write_text("\n".join(trained))
    settings_of_run = request.getfixturevalue("settings")  # a name that hypothesis has, too
    run(settings_of_run(path_datasets=str(folder), max_steps=1, drop_duplicates=drop))
    shown = capsys.readouterr().out
    said = f"{'left out:' if drop else '--drop_duplicates would leave out'} {repeats + 1} training line(s)"
    assert (said in shown) == bool(repeats)
    [report] = (tmp_path / "output").glob("*/report.html")
    assert (said in report.read_text(encoding="utf-8")) == bool(repeats)
    assert ("tested on lines it is trained on" in shown) == bool(repeats and not drop)
    kept = 30 if drop or not repeats else 30 + repeats + 1
    assert re.search(rf"train +{kept} lines, 0 blank, {0 if drop else repeats} duplicate", shown)
