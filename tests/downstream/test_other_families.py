"""Models of different families and tokenizers in one comparison: the same texts, each in its own tokens."""

import numpy as np
import pytest
from comparisons import accuracies, make_rows, read_csv, write_rows
from encoders import HARD_LINES, TOKENIZERS, make_encoder, save_encoder
from texts import make_lines

from mlm.data.tokenizer import read_vocabulary
from mlm.downstream.encoding import encode
from mlm.downstream.task import Task
from mlm.downstream.task_files import Example
from mlm.encoder.attention import block_diagonal
from mlm.errors import UserError

FAMILIES = ("bert", "roberta", "modernbert", "eurobert")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [save_encoder(folder / family, family) for family in FAMILIES]


def test_families_compare_on_a_task_and_on_general_text(tmp_path, compare, models):
    task = write_rows(tmp_path / "task.tsv", make_rows(80, 1))
    (tmp_path / "general.txt").write_text("".join(f"{line}\n" for line in [*make_lines(20), *HARD_LINES]), "utf-8")
    folder = compare(task, *models, num_seeds=2, general_text=str(tmp_path / "general.txt"))
    assert all(len(accuracies(folder, model)) == 2 for model in models)
    general = read_csv(folder / "general_text.csv")
    assert [row["model"] for row in general] == models
    assert all(1 < float(row["nats_per_character"]) < 20 for row in general)
    frozen = compare(task, *models, num_seeds=2, frozen=True)
    assert all(len(accuracies(frozen, model)) == 2 for model in models)


def test_a_broken_adapter_is_refused(tmp_path, compare, models, monkeypatch):
    def without_chunks(segment_ids, windows):
        return block_diagonal(segment_ids * 0, windows)

    monkeypatch.setattr("mlm.encoder.packed.block_diagonal", without_chunks)
    task = write_rows(tmp_path / "task.tsv", make_rows(60, 1))
    with pytest.raises(UserError, match=r"^models: .*roberta does not compute of packed lines what it"):
        compare(task, models[1])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pairs_and_words_are_framed_as_the_tokenizer_frames_them(kind):
    tokenizer = TOKENIZERS[kind]()
    one, other = "the patient was given metformin", "blood sugar fell"
    pair = [Example((one, other), ("yes",))]
    encoded = encode(pair, Task("t", "pair", ["no", "yes"], pair, [], [], []), tokenizer, 64)
    assert encoded.chunks.input_ids.tolist() == tokenizer(one, other)["input_ids"] and not encoded.shortened
    cut = encode(pair, Task("t", "pair", ["no", "yes"], pair, [], [], []), tokenizer, 12)
    assert len(cut.chunks.input_ids) == 12 and cut.shortened == 1
    words = [Example(tuple(one.split()), ("O",) * 5)]
    encoded = encode(words, Task("t", "entities", ["O"], words, [], [], []), tokenizer, 64)
    assert encoded.chunks.input_ids.tolist() == tokenizer(one)["input_ids"]  # with the spaces between its words
    assert len(encoded.chunks.label_positions) == 5


def test_a_word_without_a_token_is_masked_where_none_is_unknown():
    _, tokenizer = make_encoder("eurobert")
    words = [Example(("the", "", "patient"), ("O", "O", "O"))]
    encoded = encode(words, Task("t", "entities", ["O"], words, [], [], []), tokenizer, 64)
    assert read_vocabulary(tokenizer).unk_id == -1 and (encoded.chunks.input_ids >= 0).all()
    assert np.isin(encoded.word_ids, [-1, 0, 1, 2]).all() and len(encoded.chunks.label_positions) == 3
