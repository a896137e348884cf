"""Laws 1, 3, 6 and 8 over the whole job on a tiny corpus: how it trains, evaluates and stops, and what it leaves."""

import inspect
import json
import math
import re
import time
from dataclasses import asdict
from itertools import pairwise, repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import pad, score
from runs import folder_of, metrics, run, score_as, weights
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForMaskedLM, AutoTokenizer

import data_process
import train
from data_process import prepare
from mlm.data.chunks import count_tokens, take
from mlm.data.masking import BERT_RULE, mask
from mlm.data.tokenizer import load_tokenizer, read_vocabulary
from mlm.encoder.dropout import Dropout
from mlm.errors import UserError
from mlm.randomness import dropout_seed, epoch_order, mask_keys
from mlm.storage import lock
from mlm.text.files import find_text
from mlm.training import step as training_step
from mlm.training.checkpoint import save_if_due
from mlm.training.optimizer import MuonWithAdamW
from mlm.training.plan import Timings, learning_rate_at
from mlm.training.progress import Progress
from model import load_model


def test_what_a_run_leaves(settings, capsys):
    often = {"save_every": 7, "keep_checkpoints": 9}
    config = settings(num_epochs=2, log_every=5, tracker="tensorboard", run_name="mine", learning_rate=1e-3, **often)
    folder = run(config)
    assert {path.name for path in folder.iterdir()} == {
        "best", "checkpoints", "final", "metrics.csv", "predictions.csv", "report.html", "settings.json",
        "summary.json", "tensorboard", "test_scores.safetensors",
    }  # fmt: skip

    derived = json.loads((folder / "settings.json").read_text())["derived"]
    assert derived["steps_per_epoch"] == 12
    checkpoints = {int(path.name[5:]) for path in (folder / "checkpoints").iterdir()}
    assert checkpoints == {7, 12, 14, 21}  # every seven steps and at an epoch's end; the last one's is final/

    rows = metrics(folder)
    scores = "eval_loss eval_loss_se perplexity perplexity_se masked_accuracy test_chunks"
    changes = "change change_low change_high best_step trend trend_low trend_high"
    general = "general_loss general_loss_se general_perplexity general_test_chunks"
    general += " general_change general_change_low general_change_high"
    assert list(rows[0]) == f"step epoch train_loss lr tokens_per_s {scores} {changes} {general}".split()
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps)) and steps[0] == 0  # the start is evaluated first, no step twice
    assert [int(row["step"]) for row in rows if row["train_loss"]] == [5, 10, 15, 20, 24]  # every five, and the last
    evaluated = [row for row in rows if row["eval_loss"]]
    assert len(evaluated) == 3  # the start and two epochs
    for row in evaluated:
        assert float(row["perplexity"]) == pytest.approx(math.exp(float(row["eval_loss"])))
    assert float(evaluated[-1]["eval_loss"]) < float(evaluated[0]["eval_loss"])  # it learns

    saved = json.loads((folder / "settings.json").read_text())["settings"]
    assert saved["max_steps"] == steps[-1] and saved["mixed_precision"] == "no"
    assert asdict(config).items() - saved.items() <= asdict(config).items()
    AutoModelForMaskedLM.from_pretrained(folder / "final")
    assert (
        len(AutoTokenizer.from_pretrained(folder / "final"))
        == AutoModelForMaskedLM.from_pretrained(folder / "best").config.vocab_size
    )

    output = capsys.readouterr().out
    for word in (
        "before training, test (all chunks): perplexity",
        "unigram perplexity",
        "masked accuracy",
        f"The model: {folder}",
    ):
        assert word in output
    assert output.count("\n    before  ") == output.count("\n    after   ") >= 1
    assert output.count("initial_pretrain_model ") == 1  # the settings are printed once


def test_the_same_run_twice_gives_the_same_bits(settings):
    files = [run(settings(run_name=name, max_steps=5)) / "final" / "model.safetensors" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_dropout_is_on_in_every_step_and_off_in_evaluations(settings, monkeypatch):
    forward, modes = train.PackedMaskedLM.forward, set()

    def watched(self, *arguments, **inputs):
        modes.add((torch.is_grad_enabled(), self.training and self.model.training))
        return forward(self, *arguments, **inputs)

    monkeypatch.setattr(train.PackedMaskedLM, "forward", watched)
    run(settings(max_steps=4, eval_every=1))
    assert modes == {(True, True), (False, False)}


def test_every_micro_batch_of_every_step_drops_units_of_its_own(settings, monkeypatch):
    dropped = []

    def watched(self, tensor):
        out = dropout(self, tensor)
        if torch.is_grad_enabled() and tensor.numel() > 2000:
            dropped.append(tuple((out == 0).flatten()[:2000].tolist()))
        return out

    dropout = Dropout.forward
    monkeypatch.setattr(Dropout, "forward", watched)
    run(settings(max_steps=3, hidden_dropout=0.1, micro_batch_tokens=64))
    assert len(set(dropped)) == len(dropped) > 3 * 3
    usual = (42, 5, 1, 1)  # seed, step, micro-batch, rank
    others = [(*usual[:place], 7, *usual[place + 1 :]) for place in range(4)]
    assert len({dropout_seed(*key) for key in (usual, *others)}) == 5


def test_the_optimizer_gets_clipped_gradients_scheduled_rates_and_no_decay_for_biases(settings, monkeypatch):
    steps = []

    def watched_step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        steps.append((norm, [group["lr"] for group in self.param_groups]))
        *decayed, others = self.param_groups
        assert all(group["weight_decay"] == 0.01 for group in decayed) and others["weight_decay"] == 0.0
        assert all(p.ndim == 2 for group in decayed for p in group["params"])
        assert all(p.ndim == 1 for p in others["params"])
        return take_step(self, closure)

    take_step = MuonWithAdamW.step
    monkeypatch.setattr(MuonWithAdamW, "step", watched_step)
    config = settings(max_steps=6, max_grad_norm=0.01)
    run(config)
    for step, (norm, rates) in enumerate(steps):
        assert norm == pytest.approx(0.01, rel=1e-3)
        assert rates == [learning_rate_at(step, peak=2e-3, warmup_steps=1, decay_from=1, total_steps=6)] * 3
    assert len(steps) == 6


@pytest.mark.parametrize(("setting", "words"), [("whole_words_mask", (True, False)), ("mask_span", (False, True))])
def test_every_chunk_is_trained_on_once_an_epoch_in_a_new_order_by_the_rule(settings, monkeypatch, setting, words):
    take, training_batches, taken = data_process.take, data_process.training_batches, []

    def watched_take(chunks, indices):
        taken.append((len(chunks), indices.tolist()))
        return take(chunks, indices)

    def watched_batches(*arguments):
        named = inspect.signature(training_batches).bind(*arguments).arguments
        assert (named["seed"], named["batch_size"], named["rule"][:5]) == (5, 7, (0.3, 0.6, 0.2, *words))
        return training_batches(*arguments)

    monkeypatch.setattr(data_process, "take", watched_take)
    monkeypatch.setattr(data_process, "training_batches", watched_batches)
    shares = {"mlm_probability": 0.3, "mask_replace_prob": 0.6, "random_replace_prob": 0.2, setting: True}
    folder = run(settings(seed=5, num_epochs=2, batch_size=7, **shares))
    number = json.loads((folder / "settings.json").read_text())["derived"]["chunks"]
    assert number % 7  # the last batch of an epoch is smaller
    trained = [index for size, indices in taken if size == number for index in indices]
    epochs = trained[:number], trained[number:]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == list(range(number))


@pytest.mark.slow
def test_a_compiled_model_trains_alike_and_is_not_compiled_anew_for_every_batch(settings, monkeypatch):
    plain = run(settings(max_steps=20, hidden_dropout=0.0, run_name="plain"))
    compile_in_place, compiled = torch.nn.Module.compile, CompileCounter()
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_in_place(self, backend=compiled, **options)
    )
    folder = run(settings(max_steps=20, hidden_dropout=0.0, compile=True))
    assert 2 <= compiled.frame_count <= 3  # with and without gradients; and perhaps where a batch is one row
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(folder)[name], weight, atol=1e-5, rtol=0, msg=name)


def test_a_model_that_cannot_be_compiled_is_said_plainly(settings, monkeypatch):
    def fail(graph, inputs):
        raise ValueError("no compiler")

    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_in_place(self, backend=fail, **options)
    )
    with pytest.raises(UserError, match=r"compile: the model cannot be compiled here; .*no compiler"):
        train.main(settings(compile=True))


def test_a_step_follows_the_gradient_of_the_stock_models_mean_loss(settings, monkeypatch):
    """One SGD step, which unlike Adam's shows the gradient's scale, in many micro-batches."""

    def make_sgd(model, *others):
        return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)

    monkeypatch.setattr(train, "make_optimizer", make_sgd)
    config = settings(
        max_steps=1, num_warmup_steps=0, learning_rate=0.1, weight_decay=0.0, max_grad_norm=1e9, hidden_dropout=0.0,
        micro_batch_tokens=1,
    )  # fmt: skip
    stepped = load_file(run(config) / "final" / "model.safetensors")

    text = find_text(config)
    tokenizer = load_tokenizer(config, text.train, text.digest)
    vocabulary = read_vocabulary(tokenizer)
    chunks, _, _ = prepare(config, text, tokenizer, vocabulary)
    counts = count_tokens(chunks, vocabulary.size)
    model, _ = load_model(config, vocabulary.size, vocabulary.pad_id, count_tokens=lambda: counts)
    indices = epoch_order(config.seed, 0, len(chunks), np.arange(config.batch_size))
    tokens, lengths, _ = take(chunks, indices)
    hidden = mask(tokens, lengths, mask_keys(config.seed, 0, indices), vocabulary, BERT_RULE)
    score(model.eval(), pad(*hidden, lengths, vocabulary)).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                stepped[name], parameter.data - 0.1 * parameter.grad, atol=1e-6, rtol=0, msg=name
            )


def test_best_is_saved_when_the_test_loss_falls_and_only_then(settings, monkeypatch):
    """Looked at before each evaluation, and at the end."""
    best, seen = Path(settings().path_model_save) / "mine" / "best" / "model.safetensors", []

    def losses():
        for loss in (9.0, math.nan, 5.0, 6.0, 4.0, 4.5):
            seen.append(best.read_bytes() if best.exists() else None)
            yield loss

    score_as(monkeypatch, losses())
    run(settings(max_steps=5, eval_every=1, run_name="mine"))
    seen.append(best.read_bytes())
    assert seen[:3] == [None] * 3  # not by the baseline's 9.0, nor by what is no number
    after_5, after_6, after_4, after_the_last = seen[3:]
    assert after_5 == after_6 != after_4 == after_the_last


def test_non_finite_steps_are_skipped_and_five_in_a_row_end_the_run(settings, monkeypatch, capsys):
    cross_entropy, calls, poisoned = F.cross_entropy, [], {3, *range(5, 100)}

    def poison(logits, targets, reduction):
        if torch.is_grad_enabled():
            calls.append(None)
            if len(calls) in poisoned:
                return cross_entropy(logits, targets, reduction=reduction) * math.nan
        return cross_entropy(logits, targets, reduction=reduction)

    monkeypatch.setattr(F, "cross_entropy", poison)
    config = settings(max_steps=20, eval_every=4, run_name="poisoned", micro_batch_tokens=10**6)
    with pytest.raises(UserError, match=r"5 steps in a row, up to step 9"):
        train.main(config)
    output = capsys.readouterr().out
    assert re.findall(r"step (\d+): skipped", output) == ["3", "5", "6", "7", "8", "9"]
    for name in ("checkpoints/step-00000009", "best"):
        weights = load_file(folder_of(config) / name / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_skipped_step_is_counted_to_the_end(settings, monkeypatch, capsys):
    cross_entropy, calls = F.cross_entropy, []

    def poison(*arguments, **options):
        calls.append(torch.is_grad_enabled())
        return cross_entropy(*arguments, **options) * (math.nan if calls.count(True) == 2 and calls[-1] else 1)

    monkeypatch.setattr(F, "cross_entropy", poison)
    run(settings(max_steps=5, micro_batch_tokens=10**6))
    assert "warning: steps skipped, as their loss or gradient was not finite: 1\n" in capsys.readouterr().out


@pytest.mark.parametrize("learning_rate", [1e10, 1e38, 1e300])
def test_a_rate_that_blows_the_weights_up_ends_the_run_and_saves_none_that_are_not_finite(settings, learning_rate):
    config = settings(learning_rate=learning_rate, max_steps=30, eval_every=1, save_every=1, run_name="exploded")
    with pytest.raises(UserError, match=r"learning_rate: .* is too high"):
        train.main(config)
    folder = Path(config.path_model_save) / "exploded"
    assert not (folder / "final").exists()
    for path in folder.rglob("model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


def test_checkpoints_take_a_twentieth_of_the_time_unless_more_are_asked_for(settings, monkeypatch):
    """By a clock that a step, which does nothing else, moves by a second and a save by three."""
    clock, saved = [0.0], []

    def step(*arguments):
        clock[0] += 1
        return torch.zeros(())

    def save(setup, learner, tokenizer, progress):
        clock[0] += 3
        saved.append(progress.step)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(training_step, "accumulate_gradients", step)
    monkeypatch.setattr("mlm.training.checkpoint.save_checkpoint", save)
    score_as(monkeypatch, repeat(1.0))
    folder = run(settings(batch_size=64, max_steps=150))
    epoch = json.loads((folder / "settings.json").read_text())["derived"]["steps_per_epoch"]
    assert 1 < epoch < 20 and saved[0] == epoch and len(saved) > 1
    for step_before, step_after in pairwise(saved):
        assert step_after % epoch == 0 and 60 <= step_after - step_before < 60 + epoch
    saved.clear()
    run(settings(batch_size=64, max_steps=20, save_every=7))
    assert saved == [done for done in range(1, 20) if done % epoch == 0 or done % 7 == 0]


def test_only_the_rank_that_saves_looks_whether_it_is_time(settings, monkeypatch):
    """A look at every weight at every step would cost the others, and so all of them, much."""
    monkeypatch.setattr("mlm.training.plan.LONGEST_UNSAVED_S", 0.0)
    monkeypatch.setattr("mlm.training.checkpoint.has_finite_weights", lambda bert: pytest.fail("looked"))
    timings = Timings()
    plan = SimpleNamespace(is_save_due=lambda step: False, save_every=None)
    run = SimpleNamespace(setup=SimpleNamespace(plan=plan), learner=None, timings=timings, is_main=False)
    save_if_due(run, Progress(step=3), None)


def test_half_an_hour_is_the_most_that_is_unsaved(settings, monkeypatch):
    """By a clock that a step moves by ten minutes, in epochs of two hours; also where a save takes two minutes, but not
    where more would cost more than a twentieth, nor weights that are not finite."""
    clock, saved, cost = [0.0], [], 0.0

    def step(*arguments):
        clock[0] += 600
        return torch.zeros(())

    def save(setup, learner, tokenizer, progress):
        clock[0] += cost
        saved.append(progress.step)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(training_step, "accumulate_gradients", step)
    monkeypatch.setattr("mlm.training.checkpoint.save_checkpoint", save)
    score_as(monkeypatch, repeat(1.0))
    plain = settings(max_steps=24)
    folder = run(plain)
    assert json.loads((folder / "settings.json").read_text())["derived"]["steps_per_epoch"] == 12
    assert saved == [3, 6, 9, 12, 15, 18, 21]
    saved.clear()
    cost = 120.0
    run(plain)
    assert saved == [3, 7, 11, 15, 19, 23]  # 40 minutes for 2
    saved.clear()
    monkeypatch.setattr("mlm.training.checkpoint.has_finite_weights", lambda bert: False)
    run(plain)
    assert saved == [12]


def test_a_taken_name_is_refused_and_nothing_saved_is_touched(settings):
    folder = run(settings(run_name="mine", max_steps=1))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"run_name: .*mine exists already"):
        train.main(settings(run_name="mine", max_steps=2))
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_runs_in_one_second_do_not_collide(settings, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda layout: "now")
    config = settings(max_steps=1)
    run(config)
    run(config)
    assert len([path for path in Path(config.path_model_save).iterdir() if not path.name.startswith(".")]) == 2


def test_a_run_that_another_process_begins_in_the_same_second_is_numbered_too(settings, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda layout: "now")
    with lock(Path(settings().path_model_save) / ".cache" / "now.lock"):
        assert run(settings(max_steps=1)).name == "now-2"


def test_a_run_that_measured_nothing_leaves_no_folder(settings, text_folder):
    (text_folder / "train.txt").write_bytes(b"\xff\xff\xff")
    config = settings()
    with pytest.raises(UserError, match="not UTF-8"):
        train.main(config)
    assert not [path for path in Path(config.path_model_save).iterdir() if not path.name.startswith(".")]


def test_check_only_prepares_and_leaves_no_run(settings, capsys):
    config = settings(check_only=True)
    train.main(config)
    assert "in order" in capsys.readouterr().out
    assert [path.name for path in Path(config.path_model_save).iterdir()] == [".cache"]


def test_unknown_script_warns_of_the_tokenizer(settings, text_folder, capsys):
    train.main(settings(check_only=True))
    (text_folder / "test.txt").write_text("ギリシャ語ではない\n" * 20, encoding="utf-8")
    train.main(settings(check_only=True))
    assert "test tokens are [UNK]" in capsys.readouterr().out


def test_fp16_on_a_cpu_and_an_unknown_tracker_are_refused(settings):
    with pytest.raises(UserError, match="mixed_precision: fp16 needs a GPU"):
        train.main(settings(mixed_precision="fp16"))
    with pytest.raises(UserError, match=r"tracker: accelerate knows no 'nothing'; .* tensorboard"):
        train.main(settings(tracker="nothing"))


def test_bf16_agrees_with_float32(settings):
    losses = {}
    for precision in ("no", "bf16"):
        rows = metrics(run(settings(run_name=precision, mixed_precision=precision, max_steps=20, hidden_dropout=0.0)))
        losses[precision] = float(rows[-1]["train_loss"])
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.01)


def test_what_decorates_a_model_costs_it_nothing(settings, monkeypatch, capsys):
    """Card, page, predictions, guesses and tracker may each fail: the model is saved, and a line says what failed."""

    def fail(*arguments, **options):
        raise AttributeError("'NoneType' object has no attribute 'removeprefix'")

    for module, name in (
        (train.model_card, "make_card"),
        (train.page, "write_report"),
        (train.fill_mask, "save_predictions"),
        (train.fill_mask, "guess"),
        (train.Accelerator, "log"),
    ):
        monkeypatch.setattr(module, name, fail)
    folder = run(settings(run_name="mine", max_steps=8))
    AutoModelForMaskedLM.from_pretrained(folder / "final")
    assert json.loads((folder / "summary.json").read_text())["state"] == "finished"
    said = capsys.readouterr()
    assert "Better: " in said.out or "Cannot tell: " in said.out or "Worse: " in said.out
    for what in ("the model card", "report.html", "predictions.csv", "guessing hidden words", "the tracker"):
        assert f"warning: {what} failed: 'NoneType' object has no attribute 'removeprefix'" in said.err, what
