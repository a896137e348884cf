"""General text beside the domain's: replayed in every step without state, scored at every evaluation."""

import csv
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from reference import IGNORED, labelled
from runs import assert_close, assert_same_bits, finish, fork_ranks, metrics, run, stop_at, untimed
from texts import write_text

import train
from Config import Config
from data_process import load_corpus, replaying_batches
from mlm.data.chunks import Chunks, Corpus, GeneralText
from mlm.errors import UserError
from mlm.evaluation import loss
from mlm.randomness import epoch_order, general_seed
from mlm.training import plan as training_plan
from mlm.training.plan import Timings, make_plan

DOMAIN, GENERAL = 0, 1


def chunks_of(kind: int, number: int, vocabulary) -> Chunks:
    """Chunks of 6 to 35 tokens, of which the first ones say which text a chunk is of, and which of it."""
    lengths = 6 + np.arange(number) % 30
    bodies = [np.resize(vocabulary.regular_ids[[kind, i // 50, i % 50]], length) for i, length in enumerate(lengths)]
    tokens, offsets = np.concatenate(bodies).astype(np.uint16), np.concatenate([[0], np.cumsum(lengths)])
    return Chunks(tokens, offsets, np.arange(number))


@pytest.fixture
def corpus(vocabulary) -> Corpus:
    """100 chunks of the domain's text and 10 of general text."""
    domain, general = (chunks_of(kind, number, vocabulary) for kind, number in ((DOMAIN, 100), (GENERAL, 10)))
    text: Any = None  # which batches do not look at
    return Corpus(text, text, {}, vocabulary, domain, domain, text, GeneralText("", general, general, text))


MIXED = Config(
    batch_size=16, replay_fraction=0.25, path_general="general", max_steps=18,
    mlm_probability=0.15, mlm_probability_end=0.4,
)  # fmt: skip


def drawn(batch, vocabulary) -> list[tuple[int, int]]:
    """The chunks of a batch: of which text, and which of it."""
    ids, labels = labelled(batch.input_ids, batch.label_positions, batch.targets)
    originals = np.where(labels == IGNORED, ids, labels)
    starts = np.cumsum(batch.lengths) - batch.lengths
    rank_of = {int(token): number for number, token in enumerate(vocabulary.regular_ids)}
    heads = [[rank_of[int(token)] for token in originals[start + 1 : start + 4]] for start in starts]
    return [(kind, 50 * tens + ones) for kind, tens, ones in heads]


def test_each_step_has_its_share_of_both_and_an_epoch_of_either_each_of_its_chunks_once(vocabulary, corpus):
    """Nine steps of 12 chunks, the last of 4, are an epoch of the domain, and three of 4, 4 and 2 one of the other."""
    steps = [drawn(batch, vocabulary) for batch in islice(replaying_batches(MIXED, corpus, 0, 0, 1), 18)]
    counts = [tuple(sum(kind == of for kind, _ in step) for of in (DOMAIN, GENERAL)) for step in steps]
    assert counts == [*[(12, 4), (12, 4), (12, 2)] * 2, (12, 4), (12, 4), (4, 2)] * 2
    for kind, number, epoch_steps in ((DOMAIN, 100, 9), (GENERAL, 10, 3)):
        epochs = [
            [chunk for step in steps[first : first + epoch_steps] for of, chunk in step if of == kind]
            for first in range(0, 18, epoch_steps)
        ]
        assert all(sorted(epoch) == list(range(number)) for epoch in epochs)
        assert len({*map(tuple, epochs)}) == len(epochs)  # each in its own order


def test_a_step_counts_the_tokens_of_both(vocabulary, corpus):
    plan = make_plan(replace(MIXED, learning_rate=1e-3, eval_every=9), corpus)
    batches = list(islice(replaying_batches(MIXED, corpus, 0, 0, 1), 9))
    for batch in batches:
        assert batch.tokens == batch.lengths.sum() - 2 * len(batch.lengths)
        assert (np.diff(batch.label_positions) > 0).all()
    assert (plan.steps_per_epoch, plan.general_chunks) == (9, 4)
    assert plan.tokens_per_step == round(sum(batch.tokens for batch in batches) / 9)
    assert plan.positions_per_step == round(sum(len(batch.input_ids) for batch in batches) / 9)


@pytest.mark.parametrize("first", [1, 7, 13])
def test_steps_are_the_same_wherever_they_begin(corpus, first):
    whole = islice(replaying_batches(MIXED, corpus, 0, 0, 1), first, 18)
    for one, other in zip(whole, replaying_batches(MIXED, corpus, first, 0, 1), strict=False):
        assert all(np.array_equal(array, same) for array, same in zip(one, other, strict=True))


def test_ranks_share_both_texts(vocabulary, corpus):
    streams = [replaying_batches(MIXED, corpus, 0, rank, ranks) for rank, ranks in ((0, 1), (0, 2), (1, 2))]
    for whole, *halves in islice(zip(*streams, strict=True), 18):
        assert sorted(drawn(whole, vocabulary)) == sorted(chain(*(drawn(half, vocabulary) for half in halves)))
        assert sum(len(half.targets) for half in halves) == len(whole.targets)


def test_the_order_of_general_text_is_its_own():
    """Where both texts are the same, so is no step's half."""
    orders = [epoch_order(seed, 0, 1000, np.arange(1000)) for seed in (42, general_seed(42))]
    assert (orders[0] == orders[1]).sum() < 10
    assert general_seed(42) != general_seed(43)


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def general(tmp_path) -> str:
    return str(write_text(tmp_path / "general", train=70, test=30, seed=7))


@pytest.fixture
def replaying(long_settings, general):
    return partial(long_settings, path_general=general, replay_fraction=0.25)


def test_scoring_general_text_changes_no_bit_of_the_training(long_settings, whole, general):
    folder = run(long_settings(run_name="scored", path_general=general))
    for name in ("final", "best"):
        files = [each / name / "model.safetensors" for each in (folder, whole)]
        assert files[0].read_bytes() == files[1].read_bytes()
    for row, other in zip(untimed(folder), untimed(whole), strict=True):
        of_general = {name: value for name, value in row.items() if name.startswith("general_")}
        assert {**row, **dict.fromkeys(of_general, "")} == other
        is_first, is_evaluation = row["step"] == "0", bool(row["eval_loss"])
        filled = [bool(value) for value in of_general.values()]
        assert filled == [is_evaluation] * 4 + [is_evaluation and not is_first] * 3


def test_the_general_perplexity_is_that_of_an_evaluation_of_that_text_alone(replaying, general, capsys):
    """Before training and after."""
    trained = run(replaying(run_name="trained", max_steps=6))
    assert "; general text: perplexity " in capsys.readouterr().out
    first, last = (metrics(trained)[place] for place in (0, -1))
    assert first["general_loss"] != last["general_loss"]
    start = str(trained / "final")
    only = {"initial_pretrain_model": start, "initial_pretrain_tokenizer": start, "evaluate_only": True}
    [alone] = metrics(run(replaying(path_datasets=general, path_general=None, replay_fraction=0.0, **only)))
    for of_general, of_domain in (
        ("general_perplexity", "perplexity"), ("general_loss", "eval_loss"), ("general_loss_se", "eval_loss_se"),
        ("general_test_chunks", "test_chunks"),
    ):  # fmt: skip
        assert last[of_general] == alone[of_domain] != ""
    [beside] = metrics(run(replaying(run_name="beside", **only)))  # needs none of its training text
    assert {name: beside[name] for name in last if name.startswith("general_")} == {
        name: value if "change" not in name else "" for name, value in last.items() if name.startswith("general_")
    }
    # What was forgotten is the paired change of the same chunks.
    change = float(last["general_loss"]) - float(first["general_loss"])
    assert float(last["general_change"]) == pytest.approx(change)
    assert float(last["general_change_low"]) < change < float(last["general_change_high"])


def test_a_replaying_run_that_is_resumed_ends_with_the_same_bits(replaying, general):
    """Order, masks and a rate that varies of both texts, and the baseline of general text; it may lie elsewhere."""
    whole = run(replaying(run_name="whole", mlm_probability_end=0.4))
    folder = stop_at(replaying(run_name="a", mlm_probability_end=0.4), 7)
    moved = Path(general).rename(Path(general).with_name("moved"))
    run(replaying(run_name="a", mlm_probability_end=0.4, path_general=str(moved), resume=True))
    assert_same_bits(whole, folder)
    assert metrics(folder)[-1]["general_change"]


def test_replay_is_learned_from(replaying, general):
    """Of words in an order that the domain's text never has them in."""
    for name in ("train", "test"):
        (Path(general) / f"{name}.txt").write_text("three months and two doctors followed\n" * 30)
    losses = []
    for fraction in (0.0, 0.5):
        folder = run(replaying(run_name=f"of{fraction}", replay_fraction=fraction, max_steps=60))
        losses.append(float(metrics(folder)[-1]["general_loss"]))
    assert losses[1] < losses[0] - 0.5


@pytest.mark.slow
def test_two_ranks_replay_as_one(replaying):
    changes = {"max_steps": 12, "hidden_dropout": 0.0, "attention_dropout": 0.0, "batch_size": 11}
    changes |= {"mlm_probability_end": 0.4}
    processes = fork_ranks(replaying(run_name="two", **changes), 2)
    one = run(replaying(run_name="one", **changes))
    for process in processes:
        finish(process)
    assert_close(one, one.with_name("two"))
    for row, other in zip(metrics(one), metrics(one.with_name("two")), strict=True):
        for column in ("train_loss", "eval_loss", "general_loss"):
            assert float(row[column] or 0) == pytest.approx(float(other[column] or 0), abs=1e-4)


def test_micro_batches_replay_alike(replaying):
    changes = {"max_steps": 12, "hidden_dropout": 0.0, "attention_dropout": 0.0, "mlm_probability_end": 0.4}
    folders = [run(replaying(run_name=f"of{size}", micro_batch_tokens=size, **changes)) for size in (1, 10_000)]
    assert_close(*folders)


def test_the_dry_run_speaks_of_general_text(replaying, monkeypatch, capsys):
    monkeypatch.setattr("mlm.report.dry_run.TIMED_SECONDS", 0.1)
    train.main(replaying(dry_run=True, save_every=None))
    screen = capsys.readouterr().out
    assert "\n          general text: 70 training lines, 30 test lines\n" in screen
    assert " of 12 chunks and 4 of general text, " in screen
    assert "test chunks; general text: " in screen


def test_the_time_of_an_evaluation_is_that_of_both_texts(monkeypatch, corpus):
    """A second a chunk, of twenty of the domain and of the ten that general text has."""
    clock = [0.0]

    def evaluate(accelerator, model, batches, lines, *others):
        clock[0] += len(lines)
        return len(lines)

    monkeypatch.setattr(loss, "evaluate", evaluate)
    monkeypatch.setattr(training_plan.time, "perf_counter", lambda: clock[0])
    learner = SimpleNamespace(place=(0, 1), accelerator=None, model=None, micro_batcher=None)
    timings = Timings()
    of_run = SimpleNamespace(learner=learner, corpus=corpus, timings=timings, stop=None)
    assert train.evaluate_chunks(cast(Any, of_run), 20) == (20, 10)
    assert timings.score_chunk == 1.5


# -------------------------------------------------------------------------------------------------- what is found there


def test_general_text_is_cut_by_the_domains_vocabulary_and_cached(settings, general, tmp_path):
    plain = load_corpus(settings())
    corpus = load_corpus(settings(path_general=general, replay_fraction=0.25, add_words="auto:2"))
    assert corpus.general
    assert len(corpus.general.train.lines) > 70 and len(corpus.general.test.lines) > 30  # some lines are cut
    ids = np.concatenate([corpus.general.train.tokens, corpus.general.test.tokens]) & (2**15 - 1)
    assert ids.max() < corpus.vocabulary.size == plain.vocabulary.size + len(corpus.added_words)
    cached = {path.stat().st_ino for path in (tmp_path / "output" / ".cache").glob("text-*/stats.json")}
    load_corpus(settings(path_general=general, replay_fraction=0.25, add_words="auto:2"))
    assert {path.stat().st_ino for path in (tmp_path / "output" / ".cache").glob("text-*/stats.json")} == cached


def test_training_lines_are_needed_where_they_are_replayed(settings, general):
    (Path(general) / "train.txt").unlink()
    scored = load_corpus(settings(path_general=general)).general
    assert scored and np.array_equal(scored.train.tokens, scored.test.tokens)
    with pytest.raises(UserError, match=r"^path_general: no train\*\.txt in .*general"):
        load_corpus(settings(path_general=general, replay_fraction=0.25))
    load_corpus(settings(path_general=general, replay_fraction=0.25, evaluate_only=True))  # replays nothing


def test_a_share_is_held_out_where_general_text_has_no_test_file(settings, general):
    (Path(general) / "test.txt").unlink()
    for fraction in (0.0, 0.25):
        found = load_corpus(settings(path_general=general, replay_fraction=fraction, test_fraction=0.2)).general
        assert found and found.stats.test.lines == 14


def test_what_is_wrong_with_general_text_names_its_setting(settings, general, tmp_path):
    with pytest.raises(UserError, match=r"^path_general: .* is no folder"):
        load_corpus(settings(path_general=str(tmp_path / "none")))
    (Path(general) / "test.txt").write_bytes(b"caf\xe9 au lait, and a cup of tea")
    with pytest.raises(UserError, match=r"^path_general: .*test\.txt, line 1 is not UTF-8"):
        load_corpus(settings(path_general=general))


def test_too_little_general_text_to_replay_is_refused(settings, general):
    (Path(general) / "train.txt").write_text("three\nlines\nonly\n")
    with pytest.raises(UserError, match=r"^replay_fraction: .* has 3 chunks, fewer than the 4 of it"):
        load_corpus(settings(path_general=general, replay_fraction=0.25))
    load_corpus(settings(path_general=general, replay_fraction=0.2))  # 3 of 16


def test_what_is_odd_about_general_text_is_said(settings, general, capsys):
    (Path(general) / "notes.docx").write_text("")
    (Path(general) / "test.txt").write_text("ξένος λόγος\n" * 5, encoding="utf-8")
    train.main(settings(path_general=general, check_only=True))
    screen = capsys.readouterr().out
    assert "general text: not read in " in screen and "notes.docx" in screen
    assert "general text: warning: 100% of the test tokens are [UNK]" in screen
    assert "\n   general test  5 lines, " in screen and "general train" not in screen


def test_other_general_text_is_refused_on_resume(replaying, general):
    stop_at(replaying(run_name="a"), 2)
    with pytest.raises(UserError, match="path_general: the general text is not the one"):
        train.main(replaying(run_name="a", resume=True, path_general=None, replay_fraction=0.0))
    with pytest.raises(UserError, match=r"replay_fraction: 0\.25 when the run began, 0.5 now"):
        train.main(replaying(run_name="a", resume=True, replay_fraction=0.5))
    path = Path(general) / "test.txt"
    path.write_text(path.read_text(encoding="utf-8") + "one more line\n", encoding="utf-8")
    with pytest.raises(UserError, match="path_general: the general text is not the one"):
        train.main(replaying(run_name="a", resume=True))


def test_metrics_have_the_columns_of_general_text(whole):
    """Empty where there is none."""
    with open(whole / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"general_loss", "general_perplexity", "general_change"} <= rows[0].keys()
    assert not any(value for row in rows for name, value in row.items() if name.startswith("general_"))
