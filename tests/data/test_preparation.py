"""Preparing text: the same bytes for any number of processes, wherever one is killed, and as if in one piece."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from runs import ROOT
from texts import make_lines

from data_process import prepare
from mlm.data import preparation
from mlm.data.chunks import chunk_bounds
from mlm.data.tokenizer import read_vocabulary
from mlm.errors import UserError
from mlm.runtime import together
from mlm.storage import sizes
from mlm.text import units
from mlm.text.files import find_text


@pytest.fixture
def many_units(monkeypatch):
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", 2000)


@pytest.fixture
def text(tmp_path):
    """A folder of several files, some of which cannot be cut, of which some lines are equal."""
    folder, lines = tmp_path / "many files", make_lines(400, seed=7)
    folder.mkdir()
    (folder / "train-a.txt").write_text("".join(f"{line}\r\n" for line in [*lines[:150], "", *lines[:20]]), "utf-8")
    (folder / "train-b.txt.gz").write_bytes(gzip.compress("\n".join(lines[150:250]).encode()))
    (folder / "train-c.txt").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines[250:300]).encode())
    (folder / "test.txt").write_text("\n".join([*lines[300:], *lines[:10]]), "utf-8")
    return folder


def prepared(config, tokenizer) -> Path:
    """Prepares the text of a configuration, and returns the folder."""
    text = find_text(config)
    prepare(config, text, tokenizer, read_vocabulary(tokenizer))
    [folder] = Path(config.path_model_save).glob(".cache/text-*")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("changes", [{}, {"drop_duplicates": True}, {"held out": True}], ids=["plain", "drop", "held"])
def test_any_number_of_processes_makes_the_same_bytes(settings, text, tokenizer, monkeypatch, many_units, changes):
    """Each by itself, from where it begins: one, the last of three, one of eight, and all of three in turn."""
    changes = dict(changes)
    if changes.pop("held out", False):
        (text / "test.txt").unlink()
    found = {}
    for number, (rank, ranks) in enumerate([(0, 1), (2, 3), (5, 8)]):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        config = settings(path_datasets=str(text), path_model_save=str(text.parent / f"output{number}"), **changes)
        found[rank] = content(prepared(config, tokenizer))
    assert found[0] == found[2] == found[5] and len(found[0]) == 8
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", 1 << 24)
    whole = content(prepared(settings(path_datasets=str(text), **changes), tokenizer))
    arrays = [name for name in whole if name.endswith(".npy")]
    assert len(arrays) == 6 and all(whole[name] == found[0][name] for name in arrays)
    stats, of_units = (json.loads(files["stats.json"]) for files in (whole, found[0]))
    for split in ("train", "test"):  # of whose [UNK] a sample is explained, in each part
        stats[split].pop("unknown_causes"), of_units[split].pop("unknown_causes")
    assert stats == of_units


@pytest.mark.slow
def test_helpers_make_the_same_bytes(settings, text, tokenizer, monkeypatch, many_units):
    alone = content(prepared(settings(path_datasets=str(text)), tokenizer))
    monkeypatch.setattr(together, "count_helpers", lambda text_bytes: 2)
    write_part, done = preparation._write_part, []

    def patiently(selection, tools, index, path):
        """Waits, with its first part, until a helper has made one."""
        while not done and not list((path.parent.parent / "parts").glob("[0-9]*")):
            time.sleep(0.01)
        done.append(index)
        write_part(selection, tools, index, path)

    monkeypatch.setattr(preparation, "_write_part", patiently)
    config = settings(path_datasets=str(text), path_model_save=str(text.parent / "helped"))
    assert content(prepared(config, tokenizer)) == alone
    assert len(done) < len(find_text(config).selection.units)


def test_chunks_are_the_lines_in_their_order(settings, text, tokenizer, vocabulary, many_units):
    """By a plain loop over the files, line by line."""
    config = settings(path_datasets=str(text))
    train, test, stats = prepare(config, find_text(config), tokenizer, vocabulary)
    for chunks, names in ((train, ["train-a.txt", "train-b.txt.gz", "train-c.txt"]), (test, ["test.txt"])):
        lines = []
        for name in names:
            raw = (text / name).read_bytes()
            raw = gzip.decompress(raw) if name.endswith(".gz") else raw
            lines += raw.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n").split("\n")
        expected = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
        assert (chunks.tokens & 0x7FFF).tolist() == [token for ids in expected for token in ids]
        assert chunks.offsets[-1] == len(chunks.tokens) and np.diff(chunks.offsets).max() <= 30
        of_lines = Counter(dict.fromkeys(range(len(lines)), 0))
        bounds = chunk_bounds(np.array([len(ids) for ids in expected]))
        for begin in chunks.offsets[:-1]:
            of_lines[int(np.searchsorted(bounds, begin, side="right")) - 1] += 1
        assert len(chunks.lines) == sum(of_lines.values())
        repeated = np.repeat(np.arange(len(lines)), [of_lines[line] for line in range(len(lines))])
        same_line = chunks.lines[:, None] == chunks.lines[None]
        same_text = np.array([[lines[a] == lines[b] for b in repeated] for a in repeated])
        assert np.array_equal(same_line, same_text)
    assert (stats.train.lines, stats.train.blank, stats.train.duplicate, stats.test_lines_in_train) == (321, 1, 20, 10)
    assert stats.removable_lines == 30


KILLED = """
import random, sys, time
from transformers import AutoTokenizer
from Config import Config
from data_process import prepare
from mlm.data.tokenizer import read_vocabulary
from mlm.data import preparation
from mlm.text import selection, units
from mlm.text.files import find_text
units.SMALLEST_UNIT_BYTES = 2000
folder, output, tokenizer, slow_s = sys.argv[1:]
for module, name in ((preparation, "_write_part"), (preparation, "_copy_part"), (selection, "_sort_unit")):
    def slowly(*arguments, work=getattr(module, name)):
        print(work.__name__, arguments[-2], flush=True)
        time.sleep(float(slow_s))
        work(*arguments)
    setattr(module, name, slowly)
print("begins", flush=True)
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
config = Config(path_datasets=folder, path_model_save=output, sen_max_length=32)
prepare(config, find_text(config), tokenizer, read_vocabulary(tokenizer))
"""


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_and_makes_the_same_bytes(settings, text, tokenizer, many_units, tmp_path):
    whole = content(prepared(settings(path_datasets=str(text)), tokenizer))
    output, draw = tmp_path / "killed", random.Random(0)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-c", KILLED, text, output, tmp_path / "tokenizer"]
    environment, begun = os.environ | {"PYTHONPATH": str(ROOT)}, Counter()
    for _ in range(4):
        process = subprocess.Popen([*map(str, command), "0.02"], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(draw.randint(2, 12)):
            begun[process.stdout.readline()] += 1
        process.send_signal(signal.SIGKILL)
        begun.update(process.communicate()[0].splitlines(keepends=True))
    process = subprocess.run([*map(str, command), "0"], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    begun.update(process.stdout.splitlines(keepends=True))
    assert sum(count - 1 for task, count in begun.items() if task != "begins\n") <= 4  # those that were killed, again
    [folder] = output.glob(".cache/text-*")
    assert content(folder) == whole
    assert not list(output.glob(".cache/.*.parts"))


def test_a_damaged_cache_is_made_again(settings, text, tokenizer, many_units):
    config = settings(path_datasets=str(text))
    folder = prepared(config, tokenizer)
    before = content(folder)
    (folder / "train" / "tokens.npy").write_bytes(b"half")
    assert content(prepared(config, tokenizer)) == before
    assert set(sizes(folder)) == set(before)


def test_a_mistake_in_any_unit_is_said_and_leaves_nothing_begun(settings, text, tokenizer, many_units):
    with open(text / "train-c.txt", "ab") as file:
        file.write(b"\ncaf\xe9 au lait\n")
    with pytest.raises(UserError, match=r"train-c\.txt, line 51 is"):
        prepared(settings(path_datasets=str(text)), tokenizer)
    assert not list((text.parent / "output" / ".cache").glob(".*.parts"))
