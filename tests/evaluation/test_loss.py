"""Law 6: what an evaluation says of each chunk, how sure it is of the sum, and which chunks it takes."""

import copy
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from reference import pad, score
from runs import assert_same_bits, metrics, micro_batcher_of, run, stop_at

import data_process
from data_process import evaluation_batches, prepare
from mlm.data.chunks import Chunks, take
from mlm.data.masking import BERT_RULE, content_keys, mask
from mlm.data.packing import frame
from mlm.data.tokenizer import load_tokenizer, read_vocabulary
from mlm.encoder.packed import PackedMaskedLM
from mlm.evaluation import loss as evaluation
from mlm.evaluation.loss import Evaluation, compare, evaluate, standard_error
from mlm.randomness import evaluation_sample
from mlm.runtime.signals import StopRequest
from mlm.text.files import find_text
from mlm.training import plan as training_plan
from mlm.training.plan import Plan, affordable_chunks, middle_sample
from model import load_model


def test_evaluation_is_exp_of_mean_nll_by_the_stock_model(settings, monkeypatch):
    """Of each chunk by itself, and of all together."""
    monkeypatch.setattr(data_process, "EVALUATION_CHUNKS", 7)  # so that it takes several batches
    config = settings(mlm_probability=0.5, random_replace_prob=0.2)  # which evaluations do not follow
    text = find_text(config)
    tokenizer = load_tokenizer(config, text.train, text.digest)
    vocabulary = read_vocabulary(tokenizer)
    _, test, _ = prepare(config, text, tokenizer, vocabulary)
    model, _ = load_model(config, vocabulary.size, vocabulary.pad_id)
    batches = evaluation_batches(test, vocabulary, evaluation_sample(len(test), len(test)))
    stock = copy.deepcopy(model)  # a packed one makes no masks for padding
    packed, micro_batcher = PackedMaskedLM(model).train(), micro_batcher_of(vocabulary, 100)
    lines = test.lines[evaluation_sample(len(test), len(test))]
    found = evaluate(Accelerator(), packed, batches, lines, micro_batcher, StopRequest())
    assert found.lines is lines

    def by_stock_model(chunks):
        tokens, lengths, _ = take(test, chunks)
        hidden = mask(tokens, lengths, content_keys(tokens, lengths), vocabulary, BERT_RULE)
        with torch.no_grad():
            return score(stock.eval(), pad(*hidden, lengths, vocabulary))

    for place, chunk in enumerate(evaluation_sample(len(test), len(test))):
        alone = by_stock_model(np.array([chunk]))
        assert found.masked[place] == alone.masked_tokens
        assert found.losses[place] == pytest.approx(alone.loss.item() * alone.masked_tokens, abs=1e-4)
        assert found.correct[place] == alone.right
    expected = by_stock_model(np.arange(len(test)))
    assert found.loss == pytest.approx(expected.loss.item(), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected.loss.item()), rel=1e-4)
    assert found.accuracy == pytest.approx(expected.right / expected.masked_tokens)


def test_evaluation_is_the_same_whatever_the_run(settings, tmp_path):
    """Seed, batch size, micro-batch and training masks do not change what the same weights score."""
    first = run(settings(run_name="a", max_steps=2))
    changes = {"seed": 7, "batch_size": 5, "micro_batch_tokens": 64, "whole_words_mask": True}
    changes |= {"mlm_probability": 0.3, "mlm_probability_end": 0.9}
    start = str(first / "final")
    same = {"initial_pretrain_model": start, "initial_pretrain_tokenizer": start, "max_steps": 1}
    scores = []
    for name, more in (("b", {}), ("c", changes)):
        scores.append(float(metrics(run(settings(run_name=name, **same, **more)))[0]["eval_loss"]))
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert scores[0] == pytest.approx(float(metrics(first)[-1]["eval_loss"]), abs=1e-5)


class Echo(torch.nn.Module):
    """Guesses the token that it sees."""

    def forward(self, input_ids, label_positions, **others):
        return 100.0 * torch.nn.functional.one_hot(input_ids.flatten()[label_positions], 60)


@pytest.mark.parametrize("varlen", [False, True])
def test_masked_tokens_know_their_chunk_in_either_layout(vocabulary, varlen):
    lengths = np.random.default_rng(0).integers(1, 30, size=50)
    tokens = np.repeat(np.arange(10, 60), lengths)  # each chunk repeats one token of its own
    masked = np.sort(np.random.default_rng(1).choice(len(tokens), len(tokens) // 3, replace=False))
    targets = np.where(np.arange(len(masked)) % 3, tokens[masked], 0)  # a third are others than the model sees
    chunks, micro_batcher = (
        frame(tokens, masked, targets, lengths, vocabulary),
        micro_batcher_of(vocabulary, 100, varlen),
    )
    assert len(micro_batcher(chunks)) > 3
    lines = np.arange(50, dtype=np.uint64)
    found = evaluate(Accelerator(), Echo(), [(np.arange(50), chunks)], lines, micro_batcher, StopRequest())
    assert found.masked.tolist() == np.bincount(tokens[masked] - 10, minlength=50).tolist()
    assert found.correct.tolist() == np.bincount(targets[targets > 0] - 10, minlength=50).tolist()


# ----------------------------------------------------------------------------------------------------------- its error


def draw_evaluations(
    draw: np.random.Generator, lines: int, gain: float, spread: float, chunks_of_line: int = 1, copies: int = 1
) -> tuple[Evaluation, Evaluation]:
    """Two models on chunks of 1 to 19 masked tokens: hard and easy chunks, skewed losses; the second is better by
    `gain` in the mean, and by more or less than that from chunk to chunk. Of that a tenth of the variance is the whole
    line's. A line has as many chunks as told in the mean, in an order by chance; it occurs up to `copies` times."""
    number = draw.integers(1, 2 * chunks_of_line, size=lines)  # of chunks
    line = np.repeat(np.arange(lines), number)
    masked = draw.integers(1, 20, size=len(line)).astype(float)
    difficulty = draw.gamma(2.0, 1.5, size=len(line)) + 0.05 * masked  # long chunks are harder: sums and counts depend
    by_line, by_chunk = draw.normal(size=lines)[line], draw.normal(size=len(line))
    noise = math.sqrt(0.1) * by_line + math.sqrt(0.9) * by_chunk
    first = masked * (difficulty + 0.7 * by_line) + np.sqrt(masked) * draw.normal(0, 2, size=len(line))
    second = first - masked * (gain + spread * noise)
    order = np.repeat(np.arange(len(line)), draw.integers(1, copies + 1, size=lines)[line])
    draw.shuffle(order)
    hashes = line[order].astype(np.uint64)
    return tuple(Evaluation(sums[order], masked[order], masked[order], hashes) for sums in (first, second))


TRUE_LOSS = 3.0 + 0.05 * np.mean(np.arange(1, 20) ** 2) / np.mean(np.arange(1, 20))  # of the first


@pytest.mark.parametrize(("lines", "student_t"), [(30, 2.045), (400, 1.966)])
def test_95_percent_intervals_by_the_standard_error_hold_the_truth(lines, student_t):
    """Of a loss, and of the paired difference of two, over 2,000 drawn test texts."""
    draw = np.random.default_rng(lines)
    of_loss, of_change = [], []
    for _ in range(2000):
        first, second = draw_evaluations(draw, lines, gain=0.1, spread=0.5)
        of_loss.append(abs(first.loss - TRUE_LOSS) < student_t * first.loss_se)
        change = compare(first, second)
        of_change.append(change.low < -0.1 < change.high)
    assert 0.92 <= np.mean(of_loss) <= 0.97
    assert 0.93 <= np.mean(of_change) <= 0.97


def test_the_interval_of_two_equal_models_holds_zero():
    """An exact copy, and 1,000 pairs that differ by chance alone."""
    draw = np.random.default_rng(0)
    same, _ = draw_evaluations(draw, 100, gain=0.0, spread=0.0)
    assert compare(same, same) == (0, 0, 0, 0)
    changes = [compare(*draw_evaluations(draw, 100, gain=0.0, spread=0.5)) for _ in range(1000)]
    assert 0.93 <= np.mean([change.low < 0 < change.high for change in changes]) <= 0.97


@pytest.mark.parametrize("copies", [1, 5])
@pytest.mark.parametrize("chunks_of_line", [1, 5, 20])
def test_intervals_hold_the_truth_whatever_the_chunks_of_a_line(chunks_of_line, copies):
    """Lines are drawn, chunks are scored: in 94 to 96% of 4,000 texts of 100 lines the interval holds the true change,
    and with no change at all Better is said in 1.5 to 3.5%."""
    draw = np.random.default_rng(chunks_of_line)
    of_lines = (100, 0.0, 0.5, chunks_of_line, copies)
    changes = [compare(*draw_evaluations(draw, *of_lines)) for _ in range(4000)]
    assert 0.94 <= np.mean([change.low < 0 < change.high for change in changes]) <= 0.96
    assert 0.015 <= np.mean([change.high < 0 for change in changes]) <= 0.035


def test_errors_are_those_of_lines_by_an_independent_way():
    """The delete-one-line jackknife finds about the same; taken over chunks, the error would be too small."""
    first, _ = draw_evaluations(np.random.default_rng(0), 200, 0.0, 0.0, chunks_of_line=20)
    left_out = []
    for line in np.unique(first.lines):
        kept = first.lines != line
        left_out.append(first.losses[kept].sum() / first.masked[kept].sum())
    jackknife = math.sqrt(199 * np.var(left_out))
    assert first.loss_se == pytest.approx(jackknife, rel=0.02)
    assert first.loss_se > 1.5 * standard_error(first.losses, first.masked)


def test_pairs_are_sharper_than_the_single_errors():
    first, second = draw_evaluations(np.random.default_rng(0), 400, gain=0.1, spread=0.3)
    change = compare(first, second)
    assert change.high < 0 and change.se < first.loss_se / 3
    assert compare(first, second.first(50)) == compare(first.first(50), second.first(50))
    with pytest.raises(ValueError, match="same text"):
        compare(first, second._replace(masked=second.masked + 1))
    with pytest.raises(ValueError, match="same text"):
        compare(first, second._replace(lines=second.lines + np.uint64(1)))


def test_one_line_has_no_error_and_a_constant_has_none():
    assert standard_error(np.array([3.0]), np.array([2.0])) == math.inf
    assert standard_error(np.array([6.0, 9.0]), np.array([2.0, 3.0])) == 0
    alone = Evaluation(np.array([3.0, 9.0]), np.array([0.0, 1.0]), np.array([2.0, 1.0]), np.array([7, 7]))
    assert alone.loss_se == math.inf
    assert compare(alone, alone)[2:] == (-math.inf, math.inf)


# ---------------------------------------------------------------------------------------------------------- its sample


def test_the_first_of_an_evaluation_are_those_of_its_chunks():
    first, _ = draw_evaluations(np.random.default_rng(0), 400, gain=0.1, spread=0.3)
    assert np.array_equal(first.first(50).losses, first.losses[:50])


def sample_of(baseline: Evaluation, training_positions: int, evaluate_every: int) -> int:
    """How many chunks of 20 positions the evaluations in the middle of 32 steps score: ten of them, after every 3."""
    chunks = len(baseline.losses)
    plan = Plan(
        steps=32, steps_per_epoch=32, warmup_steps=0, decay_from=0, peak_learning_rate=1.0,
        evaluate_every=evaluate_every, save_every=None, first_test_chunks=chunks, test_chunks=chunks, tokens_per_step=0,
        positions_per_step=training_positions // 32,
    )  # fmt: skip
    return middle_sample(plan, Chunks(np.zeros(18 * chunks), 18 * np.arange(chunks + 1), baseline.lines), baseline)


def test_the_sample_suffices_for_one_percent_and_costs_a_twentieth():
    start, _ = draw_evaluations(np.random.default_rng(0), 100_000, gain=0.0, spread=0.0)
    plenty = sample_of(start, training_positions=10**12, evaluate_every=3)
    assert plenty < 100_000
    assert start.first(plenty).loss_se == pytest.approx(0.01, rel=0.05)  # nats: one per cent of the perplexity
    # 5% of the work of a million positions, at three passes each, is 150,000 positions: 750 chunks of 20 ten times.
    assert sample_of(start, training_positions=10**6, evaluate_every=3) == 750
    assert sample_of(start, training_positions=10**5, evaluate_every=3) == 256
    assert sample_of(start.first(100), training_positions=10**5, evaluate_every=3) == 100
    assert sample_of(start.first(1), training_positions=10**9, evaluate_every=32) == 1


def test_what_five_percent_of_the_training_pays_for():
    """A step is three forward passes: of a million positions 5% are 150,000 of one, 7,500 chunks of 18 tokens."""
    chunks = Chunks(np.zeros(18 * 50), 18 * np.arange(51), np.arange(50))
    assert affordable_chunks(10**6, chunks) == 7500


def test_evaluations_before_the_last_take_a_sample_and_a_resumed_run_the_same_bits(long_settings, monkeypatch, capsys):
    """Stopped in the middle, with another number of evaluations after: best/ and every figure are those of a run that
    was not."""
    monkeypatch.setattr(training_plan, "SMALLEST_SAMPLE", 6)
    monkeypatch.setattr(training_plan, "SAMPLE_ERROR", 10.0)
    whole = run(long_settings(run_name="whole"))
    rows = [row for row in metrics(whole) if row["eval_loss"]]
    taken = [int(row["test_chunks"]) for row in rows]
    assert taken == [taken[0], *[6] * (len(rows) - 2), taken[-1]] and 6 < taken[0] < taken[-1]
    said = capsys.readouterr().out
    assert f"before training, test ({taken[0]} of {taken[-1]} chunks)" in said
    assert (
        f"all {taken[-1]} chunks of test text ({taken[0]} before training; the change is on what both scored)" in said
    )
    folder = stop_at(long_settings(run_name="stopped"), 11)
    run(long_settings(run_name="stopped", resume=True))
    assert_same_bits(folder, whole)


def test_the_best_is_found_by_the_chunks_that_all_evaluations_score(long_settings, monkeypatch):
    """The last is best on the sample, and worst on the rest that it alone scores: best/ is its model."""
    monkeypatch.setattr(training_plan, "SMALLEST_SAMPLE", 2)
    monkeypatch.setattr(training_plan, "SAMPLE_ERROR", 100.0)
    sampled = iter([9.0, 5.0, 6.0, 4.0])

    def scored(accelerator, model, batches, lines, *others):
        losses = np.full(len(lines), 9.0)
        losses[:2] = next(sampled)
        return Evaluation(losses, np.zeros(len(lines)), np.ones(len(lines)), lines)

    monkeypatch.setattr(evaluation, "evaluate", scored)
    folder = run(long_settings(max_steps=12, max_test_chunks=20))
    best, last = (folder / name / "model.safetensors" for name in ("best", "final"))
    assert best.read_bytes() == last.read_bytes()


def test_no_more_chunks_than_allowed_are_scored(long_settings):
    rows = [row for row in metrics(run(long_settings(max_test_chunks=9))) if row["eval_loss"]]
    assert {row["test_chunks"] for row in rows} == {"9"}
    changes = [float(row["change"]) for row in rows[1:]]
    for row, change in zip(rows[1:], changes, strict=True):
        assert change == pytest.approx(float(row["eval_loss"]) - float(rows[0]["eval_loss"]))
        assert float(row["change_low"]) < change < float(row["change_high"])
        assert float(row["perplexity_se"]) == pytest.approx(float(row["perplexity"]) * float(row["eval_loss_se"]))
