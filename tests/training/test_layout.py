"""Law 4: ranks and micro-batches change the speed and not the training. Law 5 over several ranks.

Some tests start ranks by torchrun, as a user would, and others fork them, which is quicker.
"""

import gc
import json
import signal
import weakref
from functools import partial
from itertools import repeat
from pathlib import Path

import pytest
import torch
from reference import labelled
from runs import (
    TORCHRUN,
    assert_close,
    assert_same_bits,
    checkpoints,
    finish,
    folder_of,
    fork_ranks,
    learner_of,
    metrics,
    run,
    score_as,
    send_signals,
    start,
    stop_at,
    weights,
)

import data_process
import train
from mlm.encoder import check
from mlm.errors import UserError
from mlm.training.micro_batch_size import fit_memory
from model import load_model

CHARACTERS = "患者服用二甲双胍治疗糖尿病和高血压医生随访三个月后下降"


@pytest.fixture
def hundred_chunks(text_folder):
    """A training text of 100 chunks, so that batches of 11 end with one that leaves the second of two ranks idle."""
    lines = [f"{CHARACTERS[i % 17 :]} {CHARACTERS[: i % 23]}" for i in range(100)]
    (text_folder / "train.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    tested = [CHARACTERS[i:] + CHARACTERS[:i] for i in range(20)]  # long enough for words to be guessed
    (text_folder / "test.txt").write_text("".join(f"{line}\n" for line in tested), encoding="utf-8")


@pytest.fixture
def layout_settings(settings, hundred_chunks):
    def make(**changes):
        usual = {"max_steps": 20, "batch_size": 11, "sen_max_length": 128, "micro_batch_tokens": 64, "log_every": 5}
        return settings(**(usual | {"hidden_dropout": 0.0} | changes))

    return make


def test_micro_batches_of_1_4_and_32_chunks_train_the_same(settings, text_folder, monkeypatch):
    lines = ["".join(CHARACTERS[(i * k) % 27] for k in range(1, 7)) for i in range(200)]  # [CLS], 6 tokens and [SEP]
    (text_folder / "train.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    forward, sizes = train.PackedMaskedLM.forward, []

    def watched(self, **inputs):
        if self.training:
            sizes.append(int(((inputs["position_ids"] == 0) & (inputs["segment_ids"] > 0)).sum()))
        return forward(self, **inputs)

    monkeypatch.setattr(train.PackedMaskedLM, "forward", watched)
    training_batches, drawn = data_process.training_batches, {}

    def drawing(*arguments):
        for step in training_batches(*arguments):
            both = labelled(step.input_ids, step.label_positions, step.targets)
            rows = zip(*(array.reshape(-1, 8).tolist() for array in both), strict=True)
            drawn.setdefault(config.run_name, []).append(sorted(rows))
            yield step

    monkeypatch.setattr(data_process, "training_batches", drawing)
    folders = []
    for chunks in (1, 4, 32):
        config = settings(
            run_name=f"of{chunks}", max_steps=20, batch_size=32, micro_batch_tokens=8 * chunks, hidden_dropout=0.0
        )
        sizes.clear()
        folders.append(run(config))
        assert max(sizes) == chunks and sum(sizes) == 200 + 200 + 6 * 32
    assert drawn["of1"] == drawn["of4"] == drawn["of32"]  # the same examples and masks
    assert_close(folders[0], folders[2])
    assert_close(folders[1], folders[2])


def train_by_sgd():
    """Takes steps that show the gradient's scale, which Adam does not see, and which here is not clipped."""
    torch.optim.AdamW = lambda groups, lr, **others: torch.optim.SGD(groups, lr=lr * 50)


def assert_trained_alike(one: Path, two: Path) -> None:
    """On one rank and on two, with the same losses and weights."""
    for folder, devices in ((one, "1 x cpu"), (two, "2 x cpu")):
        derived = json.loads((folder / "settings.json").read_text())["derived"]
        assert derived["devices"] == devices and derived["chunks"] == 100
    assert_close(one, two)
    for row, other in zip(metrics(one), metrics(two), strict=True):
        for column in ("train_loss", "eval_loss"):
            assert float(row[column] or 0) == pytest.approx(float(other[column] or 0), abs=1e-4)


@pytest.mark.slow
def test_two_ranks_train_as_one(layout_settings):
    """Uneven shares of a batch, and none at all."""
    process = start(layout_settings(run_name="two", max_grad_norm=1e9), [*TORCHRUN, "train.py"])
    one = run(layout_settings(run_name="one", max_grad_norm=1e9))
    finish(process)
    assert_trained_alike(one, one.with_name("two"))


@pytest.mark.slow
def test_two_ranks_sum_gradients_of_the_same_scale_as_one(layout_settings, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.AdamW)  # put back after the test
    processes = fork_ranks(layout_settings(run_name="two", max_grad_norm=1e9), 2, {0: train_by_sgd, 1: train_by_sgd})
    train_by_sgd()
    one = run(layout_settings(run_name="one", max_grad_norm=1e9))
    for process in processes:
        finish(process)
    assert_trained_alike(one, one.with_name("two"))


def stop_in_step_8():
    send_signals(pytest.MonkeyPatch(), 8, signal.SIGTERM)


@pytest.fixture
def whole(layout_settings):
    return run(layout_settings(run_name="whole"))


def assert_moved(folder: Path, whole: Path, said: str, devices: str) -> None:
    """The run ended on other devices than it began, as if it had not moved."""
    assert json.loads((folder / "settings.json").read_text())["derived"]["devices"] == devices
    assert "\n    before  " in said and "The model: " in said
    assert_close(folder, whole)
    assert [row["step"] for row in metrics(folder)] == [row["step"] for row in metrics(whole)]


@pytest.mark.slow
def test_a_run_begun_on_two_ranks_ends_the_same_on_one(layout_settings, whole, capsys):
    """The signal comes to the last rank alone, and both stop after the same step."""
    config = layout_settings(run_name="moved")
    first, second = fork_ranks(config, 2, {1: stop_in_step_8})
    out, _ = finish(first, 143)
    finish(second, 143)
    assert "stopped after step 8" in out and "--resume" in out
    assert checkpoints(folder_of(config)) == [8]
    capsys.readouterr()
    folder = run(layout_settings(run_name="moved", resume=True, micro_batch_tokens=300))
    assert_moved(folder, whole, capsys.readouterr().out, "1 x cpu")


@pytest.mark.slow
def test_a_run_begun_on_one_rank_ends_the_same_on_two(layout_settings, whole, capsys):
    folder = stop_at(layout_settings(run_name="moved"), 8)
    out = capsys.readouterr().out
    assert "stopped after step 8" in out and "--resume" in out
    assert checkpoints(folder) == [8]
    first, second = fork_ranks(layout_settings(run_name="moved", resume=True, micro_batch_tokens=300), 2)
    out, _ = finish(first)
    finish(second)
    assert_moved(folder, whole, out, "2 x cpu")


@pytest.mark.slow
def test_three_ranks_resume_with_the_same_bits(layout_settings):
    """Of two summands the order does not matter; of three it does. The signal comes to one rank alone."""
    settings = partial(layout_settings, hidden_dropout=0.1)
    for config, status, before in (
        (settings(run_name="whole"), 0, {}),
        (settings(run_name="resumed"), 143, {1: stop_in_step_8}),
        (settings(run_name="resumed", resume=True), 0, {}),
    ):
        for process in fork_ranks(config, 3, before):
            finish(process, status)
        if status:
            assert checkpoints(folder_of(config)) == [8]
    folders = [folder_of(settings(run_name=name)) for name in ("whole", "resumed")]
    assert json.loads((folders[0] / "settings.json").read_text())["derived"]["devices"] == "3 x cpu"
    assert_same_bits(*folders)


def test_machines_with_different_text_are_refused(settings, monkeypatch):
    monkeypatch.setattr(
        "mlm.runtime.distributed.gather_object", lambda objects: [*objects, {"text": "another", "tokenizer": "another"}]
    )
    with pytest.raises(train.UserError, match="path_datasets: text, words or tokenizer differ between the machines"):
        train.main(settings())


def test_machines_may_have_their_text_and_gpus_by_other_names(settings, monkeypatch):
    gathered = []
    monkeypatch.setattr("mlm.runtime.distributed.gather_object", lambda objects: gathered.extend(objects) or objects)
    run(settings(max_steps=1))
    assert [digests.keys() for digests in gathered] == [{"text", "general", "tokenizer", "user_words"}]


@pytest.fixture
def run_out_of_memory(monkeypatch):
    """Has every forward pass of more than so many positions fail as on a GPU without memory: with an error that is part
    of a cycle, so that only the garbage collector frees what the pass had made. The next pass must find it freed."""
    forward, left = train.PackedMaskedLM.forward, []

    def limit(positions: int) -> None:
        def limited(self, input_ids, *arguments, **more):
            assert not any(activations() is not None for activations in left)
            if input_ids.numel() > positions:
                activations, error = torch.zeros(1), torch.OutOfMemoryError("no memory")
                left.append(weakref.ref(activations))
                raise error  # whose traceback knows this frame, which knows the error
            return forward(self, input_ids, *arguments, **more)

        monkeypatch.setattr(train.PackedMaskedLM, "forward", limited)

    gc.disable()  # it would come by at some time, or not
    yield limit
    gc.enable()


def test_a_step_out_of_memory_is_cut_finer_and_repeated(settings, monkeypatch, run_out_of_memory, capsys):
    usual = {"max_steps": 6, "hidden_dropout": 0.1}
    small = run(settings(run_name="small", micro_batch_tokens=64, **usual))
    score_as(monkeypatch, repeat(1.0))
    run_out_of_memory(positions=64 + 32)  # a row may be longer by less than a chunk
    capsys.readouterr()
    cut = run(settings(run_name="cut", micro_batch_tokens=256, **usual))
    assert weights(cut).keys() == weights(small).keys()
    assert all(torch.equal(tensor, weights(small)[name]) for name, tensor in weights(cut).items())
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert said == [f"step 1: out of memory; this and all later steps use micro-batches of {n}" for n in (128, 64)]


def test_a_chunk_that_does_not_fit_the_memory_is_said_plainly(settings, monkeypatch, run_out_of_memory):
    score_as(monkeypatch, repeat(1.0))
    monkeypatch.setattr(check, "refuse_differences", lambda *arguments: None)  # which needs as much
    run_out_of_memory(positions=20)
    with pytest.raises(UserError, match="micro_batch_tokens: out of memory"):
        run(settings(max_steps=2, micro_batch_tokens=256))


@pytest.mark.parametrize(("positions", "expected"), [(10**6, 16 * 32), (200, 128), (1, 32)])
def test_the_largest_micro_batch_that_fits_is_found_by_trying(
    settings, vocabulary, run_out_of_memory, positions, expected
):
    """At most a step's 16 chunks of 32 tokens, and at least one chunk."""
    bert, _ = load_model(settings(), vocabulary.size, vocabulary.pad_id)
    run_out_of_memory(positions)
    learner = learner_of(bert, vocabulary)
    assert fit_memory(learner, settings()) == expected
    assert all(parameter.grad is None for parameter in learner.model.parameters())  # nothing of it is left
