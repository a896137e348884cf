"""Laws 1, 2, 3 and 8 whatever is in the text files or the settings: it trains, or what is wrong is said plainly.

More of it: EXAMPLES=1000 pytest tests/test_any_input.py
"""

import copy
import gzip
import lzma
import math
import os
import re
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, event, example, given, settings, strategies
from reference import IGNORED, labelled, pad, score
from runs import micro_batcher_of
from transformers import BertConfig, BertForMaskedLM

from Config import SCRATCH_SIZES, Config
from data_process import prepare, training_batches
from mlm.data.chunks import Chunks, take
from mlm.data.masking import BERT_RULE, MaskRule
from mlm.data.packing import Sequences
from mlm.data.text_stats import TextStats
from mlm.encoder.packed import PackedMaskedLM
from mlm.errors import UserError
from mlm.settings import describe_settings
from mlm.text.files import find_text
from mlm.training.plan import learning_rate_at, resolve

EXAMPLES = int(os.environ.get("EXAMPLES", 60))  # texts; of configurations ten times as many
unhurried = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}

FRAGMENTS = [
    "given metformin", "患者服用二甲双胍", "T恤C++", "日本語を", "😀", "[MASK]", "[SEP] [CLS]", "[UNK]", "ξένος",
    "##ing", " ", "\t", "\r", "\x00", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\ufeff", "\u200b", "e\u0301",
    "word" * 60, "a " * 90,
]  # fmt: skip
TEXT = strategies.one_of(
    strategies.lists(strategies.sampled_from(FRAGMENTS), max_size=6).map(lambda parts: "".join(parts).encode()),
    strategies.text(max_size=60).map(lambda line: line.encode(errors="replace")),
)
BYTES = strategies.lists(TEXT | strategies.binary(max_size=20), max_size=12)
RULES = [BERT_RULE, MaskRule(whole_words=True), MaskRule(spans=True)]
LINES = strategies.one_of([strategies.lists(TEXT, min_size=2, max_size=12)] * 3 + [BYTES])
CONTENTS = strategies.builds(
    lambda lines, end, last, mark: mark + end.join(lines) + last,
    LINES,
    strategies.sampled_from([b"\n", b"\r\n"]),
    strategies.sampled_from([b"", b"\n"]),
    strategies.sampled_from([b"", b"", b"\xef\xbb\xbf"]),
)


@pytest.fixture(scope="module")
def bert(tokenizer):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **shape)).eval()


def reference_lines(content: bytes) -> list[str]:
    """By one decoding of it all; raises UnicodeDecodeError."""
    return [line.removesuffix("\r").strip() for line in content.decode("utf-8-sig").split("\n")]


class Prepared(NamedTuple):
    """What the files were made into."""

    train: Chunks
    test: Chunks
    stats: TextStats


@pytest.fixture(scope="module")
def prepare_files(tmp_path_factory, tokenizer, vocabulary):
    """Prepares files of such contents, for chunks of at most 14 tokens. No test file for None. Raises UserError."""

    def prepare_files(train: bytes, test: bytes | None) -> Prepared:
        folder = tmp_path_factory.mktemp("any")
        (folder / "train.txt").write_bytes(train)
        if test is not None:
            (folder / "test.txt").write_bytes(test)
        config = Config(path_datasets=str(folder), path_model_save=str(folder / "output"), sen_max_length=16)
        return Prepared(*prepare(config, find_text(config), tokenizer, vocabulary))

    return prepare_files


@settings(max_examples=EXAMPLES, **unhurried)
@given(train=CONTENTS, test=strategies.none() | CONTENTS)
@example(train=b"", test=None)
@example(train=b"one line in all", test=None)
@example(train=b"the same\n", test=b"the same\n")
@example(train=b"fine\n", test=b"\n \n\x00\n")
@example(train=b"[MASK] [SEP]\r[UNK]\n\n", test=b"\xe2\x80\xa8 \xc2\x85x\n")
def test_any_text_is_kept_or_refused(prepare_files, tokenizer, train, test):
    """Laws 2 and 8: each split has all tokens of its lines, or what is wrong is said."""
    files = {"train": train} | ({} if test is None else {"test": test})
    try:
        found = prepare_files(train, test)
    except UserError as refused:
        assert is_right_to_refuse(str(refused), files, tokenizer), refused
        return event("refused")
    event("kept")
    lines = {name: [line for line in reference_lines(content) if line] for name, content in files.items()}
    tokens = {name: tokens_of(tokenizer, of_split) for name, of_split in lines.items()}
    if test is None:  # some distinct lines are held out
        assert sorted(stored(found.train) + stored(found.test)) == sorted(tokens["train"])
        assert not found.stats.test_lines_in_train
    else:
        assert stored(found.train) == tokens["train"] and stored(found.test) == tokens["test"]
        assert bool(found.stats.test_lines_in_train) == bool(set(lines["train"]) & set(lines["test"]))


def first_epoch(prepare_files, vocabulary, content: bytes, rule: MaskRule) -> tuple[Chunks, list[Sequences]]:
    """The chunks of a training text, and the batches of an epoch, of four chunks each. A text that is refused is no
    case for the test that asks."""
    try:
        chunks = prepare_files(content, b"some test text").train
    except UserError:
        assume(False)
    steps = training_batches(chunks, vocabulary, rule, 0, batch_size=4)
    return chunks, list(islice(steps, math.ceil(len(chunks) / 4)))


@settings(max_examples=EXAMPLES, **unhurried)
@given(content=CONTENTS, rule=strategies.sampled_from(RULES))
def test_every_chunk_of_any_text_teaches_and_an_epoch_has_every_token_once(prepare_files, vocabulary, content, rule):
    """Laws 1 and 2."""
    chunks, batches = first_epoch(prepare_files, vocabulary, content, rule)
    seen = []
    for batch in batches:
        input_ids, labels = labelled(batch.input_ids, batch.label_positions, batch.targets)
        originals, is_chosen = np.where(labels != IGNORED, labels, input_ids), labels != IGNORED
        tokens_before = len(seen)
        ends = np.cumsum(batch.lengths)
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            assert originals[[start, end - 1]].tolist() == [vocabulary.cls_id, vocabulary.sep_id]
            assert not is_chosen[[start, end - 1]].any() and is_chosen[start:end].any()
            assert batch.position_ids[start:end].tolist() == [*range(end - start)]
            assert end - start <= 16
            seen += originals[start + 1 : end - 1].tolist()
        assert batch.tokens == len(seen) - tokens_before and len(batch.targets) == is_chosen.sum()
    assert sorted(seen) == sorted(stored(chunks))


@settings(max_examples=EXAMPLES, **unhurried)
@given(content=CONTENTS, rule=strategies.sampled_from(RULES))
def test_chunks_of_any_text_never_see_each_other(prepare_files, vocabulary, bert, content, rule):
    """Law 3: packed, their loss is that of the stock model on padded chunks."""
    _, batches = first_epoch(prepare_files, vocabulary, content, rule)
    for batch in batches:
        ends = np.cumsum(batch.lengths)
        is_text = np.ones(ends[-1], dtype=bool)
        is_text[ends - 1] = is_text[ends - batch.lengths] = False
        masked = (np.cumsum(is_text) - 1)[batch.label_positions]
        lengths = batch.lengths - 2
        with torch.no_grad():
            padded = pad(batch.input_ids[is_text], masked, batch.targets, lengths, vocabulary)
            expected = score(bert, padded)
        padded_loss = expected.loss.item() * expected.masked_tokens
        assert packed_loss(bert, batch, vocabulary) == pytest.approx(padded_loss, abs=1e-4)


def stored(chunks) -> list[int]:
    return take(chunks, np.arange(len(chunks)))[0].tolist()


def tokens_of(tokenizer, lines: list[str]) -> list[int]:
    """Line by line, through the public call."""
    ids = [tokenizer(line, add_special_tokens=False, split_special_tokens=True)["input_ids"] for line in lines]
    return [token for line in ids for token in line]


def is_right_to_refuse(said: str, files: dict[str, bytes], tokenizer) -> bool:
    if bad := re.search(r"(train|test)\.txt, line (\d+) is (?:not UTF-8|UTF-8 but)", said):
        lines = files[bad[1]].split(b"\n")
        reference_lines(b"\n".join(lines[: int(bad[2]) - 1]))  # those before it are
        with pytest.raises(UnicodeDecodeError):
            reference_lines(lines[int(bad[2]) - 1])
        return True
    assert said.startswith("path_datasets: ")
    if re.search("holds one line only|is empty", said):
        lines = {line for line in reference_lines(files["train"]) if line}
        return len(files) == 1 and len(lines) == ("one line" in said)
    split = re.search(r"no line of (train|test)\* holds a token to train or test on", said)[1]
    if len(files) == 1:  # lines without a token may be all that is held out, or all that is not
        return any(not tokens_of(tokenizer, [line]) for line in reference_lines(files["train"]))
    return not tokens_of(tokenizer, reference_lines(files[split]))


@torch.no_grad()
def packed_loss(bert, chunks, vocabulary):
    model, pieces = PackedMaskedLM(copy.deepcopy(bert)), micro_batcher_of(vocabulary, 40)(chunks)
    return sum(F.cross_entropy(model(**inputs), wanted, reduction="sum").item() for inputs, wanted in pieces)


NAMES = strategies.builds(
    lambda split, folder, ending, packed: f"{split}{folder}{ending}{packed}",
    strategies.sampled_from(["train", "train", "train", "Train", "test", "dev", "valid", "corpus", ".train", "README"]),
    strategies.sampled_from(["", "", "", "-1", "-parts/0"]),
    strategies.sampled_from([".txt", ".TXT", ".jsonl", ".csv", ".tsv", ".parquet", ".docx", ""]),
    strategies.sampled_from(["", "", "", ".gz", ".xz", ".zst"]),
)
IS_DAMAGED = strategies.sampled_from([False] * 9 + [True])
CELLS = strategies.lists(strategies.text(max_size=20) | strategies.sampled_from(FRAGMENTS), min_size=1, max_size=5)


def write_texts(path: Path, texts: list[str], is_damaged: bool) -> None:
    """Writes a text a row, or a line, in the format and packing that the name says."""
    name, frame = path.name.lower(), pd.DataFrame({"text": texts})
    content = "\n".join((["text"] if ".tsv" in name else []) + texts).encode()
    if ".parquet" in name:
        content = frame.to_parquet()
    elif ".jsonl" in name:
        content = frame.to_json(orient="records", lines=True).encode()
    elif ".csv" in name:
        content = frame.to_csv(index=False).encode()
    packers = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
    content = packers.get(path.suffix.lower(), bytes)(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content[:-3] + b"\xff" if is_damaged else content)


@settings(max_examples=2 * EXAMPLES, **unhurried)
@given(files=strategies.dictionaries(NAMES, strategies.tuples(CELLS, IS_DAMAGED), min_size=1, max_size=5))
def test_any_folder_is_read_or_refused_and_what_is_not_read_is_named(tmp_path_factory, files):
    """Law 8: every file that is whole is read, or its name is said, but for READMEs and what is hidden."""
    folder = tmp_path_factory.mktemp("folder")
    texts = {}
    for name, (cells, is_damaged) in files.items():
        printable = ["".join(filter(str.isprintable, cell)) for cell in cells]
        texts[name] = [f"{name} {number} {cell}".strip() for number, cell in enumerate(printable)]
        write_texts(folder / name, texts[name], is_damaged)
    try:
        text = find_text(Config(path_datasets=str(folder), path_model_save=str(folder / ".output"), test_fraction=0.5))
        lines = {*text.train(), *text.test()}
    except UserError as refused:
        assert str(refused).startswith("path_datasets: ") and "\n" not in str(refused), refused
        return event("refused")
    event("read")
    for name in texts:
        is_aside = any(part.startswith((".", "README")) for part in Path(name).parts)
        is_damaged = files[name][1]
        is_said = any(name in note for note in text.notes) or name.partition("/")[0] + "/" in " ".join(text.notes)
        assert is_aside or is_damaged or lines.issuperset(texts[name]) or is_said, (name, text.notes)
        assert not (is_aside and lines.intersection(texts[name]))


SAMPLES = [
    "auto:3", "auto:0", "auto:²", "scratch:tiny", "scratch:huge", "corpus", "auto", "bf16", "", " ", ".", "a/b", "a\0b",
    "\ud800", "0,1", ",",
]  # fmt: skip
NUMBERS = [0, 1, 2, 3, 7, 512, -1, 0.1, 0.5, 0.9, 1.0, 1e-320, 1e300, 2**31, 2**63, 10**400, math.nan, math.inf, -0.0]
USUAL = strategies.one_of(
    strategies.sampled_from([*SAMPLES, *NUMBERS, None, True, False]), strategies.text(max_size=10),
    strategies.integers(0, 10**6), strategies.floats(0, 1),
)  # fmt: skip
UNUSUAL = strategies.one_of(
    strategies.integers(), strategies.floats(), strategies.binary(max_size=3), strategies.just({}),
    strategies.lists(strategies.integers(), max_size=2), strategies.just(Path("data")),
)  # fmt: skip
VALUES = USUAL | USUAL | UNUSUAL


@settings(max_examples=10 * EXAMPLES, **unhurried)
@given(strategies.dictionaries(strategies.sampled_from([field.name for field in fields(Config)]), VALUES, max_size=2))
@example({"num_warmup_steps": math.inf})
@example({"tracker": "\ud800"})
@example({"learning_rate": 10**400})
@example({"add_words": "auto:" + "9" * 5000})
def test_any_configuration_is_accepted_or_refused_by_name(changes):
    try:
        config = Config(**changes)
        resolved = resolve(config, epoch_steps=7, precision="no", width=768)
    except UserError as refused:
        accused = {name for line in str(refused).splitlines() for name in line.partition(": ")[0].split(", ")}
        assert accused <= asdict(Config()).keys() and accused & {*changes, "max_steps"}, refused
        return event("refused")
    event("accepted")
    describe_settings(resolved, config).encode()  # it can be printed
    assert resolved.scratch_size in (None, *SCRATCH_SIZES)
    peak, warmup, total = resolved.learning_rate, int(resolved.num_warmup_steps), resolved.max_steps
    rates = [learning_rate_at(step, peak, warmup, warmup, total) for step in {0, total // 2, total - 1}]
    assert all(0 <= rate <= peak for rate in rates)
    for name in ("path_datasets", "path_model_save", "run_name"):
        Path(getattr(config, name) or "a").exists()
