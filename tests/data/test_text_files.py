"""Law 2: no text is lost. Law 8: unreadable text is said plainly, with file and line."""

import gzip
import math
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from texts import make_lines

from data_process import prepare, training_batches
from mlm.data.chunks import cut_line, take
from mlm.data.masking import BERT_RULE
from mlm.data.packing import pack
from mlm.data.text_files import distinct, find_text, read_lines, read_sample
from mlm.data.text_stats import histogram
from mlm.data.tokenizer import learn_tokenizer, read_vocabulary
from mlm.errors import UserError


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


@pytest.mark.parametrize(
    ("content", "line", "encoding"),
    [
        ("good\n糖尿病患者的治疗方案\n".encode("gbk"), 2, "GBK"),
        ("plain text\nmore".encode("utf-16"), 1, "UTF-16"),
        ("caf\xe9 au lait\n".encode("latin-1"), 1, "WINDOWS-1252"),
        (b"PK\x03\x04\x14\x00\x06\xff\n", 1, "a binary file"),
    ],
)
def test_undecodable_bytes_name_file_line_and_encoding(tmp_path, content, line, encoding):
    path = tmp_path / "train.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"train\.txt, line {line} is not UTF-8; it looks like {encoding}"):
        list(read_lines([path]))


def test_broken_gzip_is_said_plainly(tmp_path):
    whole = gzip.compress(b"line\n" * 1000)
    for content in (b"no gzip at all", whole[: len(whole) // 2]):
        (tmp_path / "train.txt.gz").write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*train\.txt\.gz"):
            list(read_lines([tmp_path / "train.txt.gz"]))


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


@pytest.mark.parametrize("present", ["nothing", "only test.txt"])
def test_missing_text_is_said_plainly(tmp_path, settings, present):
    if present == "only test.txt":
        (tmp_path / "test.txt").write_text("t")
    with pytest.raises(UserError, match=r"path_datasets: no train\*\.txt"):
        find_text(settings(path_datasets=str(tmp_path if present == "only test.txt" else tmp_path / "none")))


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
        batch = pack(next(steps).chunks, 64, vocabulary)
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


def test_text_without_a_token_is_said_plainly(tmp_path, settings, text_of, tokenizer, vocabulary):
    with pytest.raises(UserError, match=r"no line of train\*\.txt holds a token"):
        stored_tokens(tmp_path, settings, text_of(tmp_path, b"\x00\n\n"), tokenizer, vocabulary)
    assert not [path for path in (tmp_path / "output" / ".cache").iterdir() if path.suffix != ".lock"]


def test_prepared_text_is_found_again_and_keyed_by_what_decides_it(tmp_path, settings, text_of, tokenizer, vocabulary):
    text = text_of(tmp_path, b"the patient was given insulin\n")

    def forbidden():
        raise AssertionError("the text was tokenized again")

    first, _, _ = stored_tokens(tmp_path, settings, text, tokenizer, vocabulary)
    again, _, _ = stored_tokens(tmp_path, settings, text._replace(train=forbidden), tokenizer, vocabulary)
    assert np.array_equal(first.tokens, again.tokens)
    with pytest.raises(AssertionError):
        stored_tokens(tmp_path, settings, text._replace(train=forbidden), tokenizer, vocabulary, sen_max_length=16)
    other = learn_tokenizer(lambda: iter(["insulin"]), 50)
    with pytest.raises(AssertionError):
        stored_tokens(tmp_path, settings, text._replace(train=forbidden), other, read_vocabulary(other))


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


def test_hashes_are_counted_as_numpy_counts_them():
    hashes = np.random.default_rng(0).integers(0, 2**63, 1000, dtype=np.uint64) * np.uint64(2)
    repeated = array("Q", np.concatenate([hashes, hashes[:300]]).tolist())
    assert np.array_equal(distinct(repeated), np.unique(hashes))
    assert len(distinct(array("Q"))) == 0


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
    removed, unlink = [], Path.unlink

    def look_and_unlink(path, **options):
        removed.append(path.name)
        assert path.name not in Path("/proc/self/maps").read_text()
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", look_and_unlink)
    config = settings()
    prepare(config, find_text(config), tokenizer, vocabulary)
    assert {"train.tokens", "train.lines", "test.tokens"} <= {*removed}
