"""Law 5: interrupted equals uninterrupted. Signals, kills and crashes, and what comes back when a run is resumed."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from runs import (
    assert_same_bits,
    checkpoint,
    checkpoints,
    finish,
    fork_run,
    metrics,
    read_until,
    run,
    score_as,
    stop_at,
    untimed,
    weights,
)

import data_process
import train
from mlm.errors import UserError


@pytest.mark.slow
def test_killed_five_times_it_ends_with_the_same_bits(long_settings):
    """kill -9 at random moments, each after another random step was reported, before the first checkpoint or after."""
    config = long_settings(run_name="whole", max_steps=60, log_every=1)
    whole = fork_run(config)
    seed = random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    print(f"seed {seed}")  # of the moments
    config = long_settings(run_name="killed", max_steps=60, log_every=1, resume=True)
    for step in sorted(draw.sample(range(1, 58), 5)):
        process = fork_run(config)
        read_until(process, *(f"step {later}/60, epoch" for later in range(step, 60)))  # it may resume after `step`
        time.sleep(draw.uniform(0, 0.03))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    out, _ = finish(fork_run(config))
    assert "resumed from" in out
    finish(whole)
    output = Path(config.path_model_save)
    assert_same_bits(output / "killed", output / "whole")
    assert len(metrics(output / "whole")) == 61


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (1, signal.SIGTERM),  # before the first checkpoint
        (8, signal.SIGINT),  # when an evaluation is due
        (10, signal.SIGTERM),  # when a checkpoint is due
        (12, signal.SIGTERM),  # when a row and an evaluation are due
        (26, signal.SIGINT),  # in the last step
    ],
)
def test_a_signal_in_a_step_lets_it_end_and_the_resumed_run_ends_with_the_same_bits(
    long_settings, whole, capsys, step, kind
):
    folder = stop_at(long_settings(run_name="stopped"), step, kind)
    assert checkpoints(folder)[-1] == step and not (folder / "final").exists()
    assert f"stopped after step {step}" in capsys.readouterr().out
    run(long_settings(resume=True))  # finds the unfinished run by itself
    assert_same_bits(folder, whole)


@pytest.mark.parametrize(("step", "kind"), [(0, signal.SIGINT), (12, signal.SIGTERM)])
def test_a_signal_in_an_evaluation_saves_the_step_before_and_the_resumed_run_ends_with_the_same_bits(
    long_settings, whole, capsys, step, kind
):
    folder = stop_at(long_settings(run_name="stopped"), step, kind, evaluation_batch=1)
    assert checkpoints(folder)[-1] == step and not (folder / "final").exists()
    assert f"stopped after step {step}" in capsys.readouterr().out
    run(long_settings(resume=True))
    assert_same_bits(folder, whole)


def test_a_second_sigterm_changes_nothing(long_settings):
    """Launchers and schedulers send one each."""
    folder = stop_at(long_settings(run_name="twice"), 8, times=2)
    assert checkpoints(folder)[-1] == 8


def test_an_evaluation_is_given_up_when_a_signal_comes(long_settings, monkeypatch):
    monkeypatch.setattr(data_process, "EVALUATION_CHUNKS", 1)
    calls = []
    forward = train.PackedMaskedLM.forward

    def watched(self, **inputs):
        calls.append(self.training)
        return forward(self, **inputs)

    monkeypatch.setattr(train.PackedMaskedLM, "forward", watched)
    stop_at(long_settings(), 0, evaluation_batch=3)
    assert calls == [False] * 3  # the check at the start, and two batches: it came while the third was drawn


@pytest.mark.slow
def test_the_gradient_scaler_comes_back(long_settings, monkeypatch):
    """float16 with a scaler that overflows and grows again every few steps, on the CPU."""

    class Scaled(Accelerator):
        def __init__(self, mixed_precision, **options):
            super().__init__(mixed_precision="fp16", **options)
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4)

    monkeypatch.setattr("mlm.runtime.distributed.Accelerator", Scaled)
    whole = run(long_settings(run_name="whole", max_steps=14))
    folder = stop_at(long_settings(run_name="a", max_steps=14), 11)
    scaler = json.loads((checkpoint(folder, 11) / "state.json").read_text())["scaler"]
    assert scaler["scale"] not in (0, 2.0**20) and scaler["_growth_tracker"] > 0  # neither fresh nor just halved
    run(long_settings(resume=True, max_steps=14))
    assert_same_bits(folder, whole)


def test_masks_of_spans_and_words_of_ones_own_come_back(long_settings, tmp_path):
    """The files of words may lie elsewhere by then."""
    for name, words in (("add", "glimepiride\n治疗糖尿病\n"), ("user", "服用二甲双胍\n")):
        (tmp_path / f"{name}.txt").write_text(words, encoding="utf-8")
    changes = {f"{name}_words": str(tmp_path / f"{name}.txt") for name in ("add", "user")}
    whole = run(long_settings(run_name="whole", mask_span=True, **changes))
    folder = stop_at(long_settings(run_name="a", mask_span=True, **changes), 7)
    for name in ("add", "user"):
        (tmp_path / f"{name}.txt").rename(tmp_path / f"moved-{name}.txt")
    changes = {f"{name}_words": str(tmp_path / f"moved-{name}.txt") for name in ("add", "user")}
    run(long_settings(run_name="a", mask_span=True, resume=True, **changes))
    assert_same_bits(whole, folder)


def test_a_masking_probability_that_varies_goes_on_where_it_was(long_settings):
    """The steps on both sides of the resume are masked at once in the run that nothing interrupted."""
    falls = {"mlm_probability": 0.4, "mlm_probability_end": 0.1}
    whole = run(long_settings(run_name="whole", **falls))
    folder = stop_at(long_settings(run_name="a", **falls), 7)
    run(long_settings(run_name="a", resume=True, **falls))
    assert_same_bits(whole, folder)


def test_rows_after_the_checkpoint_go(long_settings):
    folder = stop_at(long_settings(run_name="a", log_every=4), 9)
    rows = untimed(folder)
    assert [int(row["step"]) for row in rows] == [0, 4, 8]
    shutil.rmtree(checkpoint(folder, 9))  # as if killed in step 9
    stop_at(long_settings(resume=True, log_every=4), 6)
    assert untimed(folder) == rows[:-1]
    run(long_settings(resume=True, log_every=4))
    assert untimed(folder)[: len(rows)] == rows
    steps = [int(row["step"]) for row in metrics(folder)]
    assert steps == sorted(set(steps)) and steps[-1] == 26


def test_the_best_loss_comes_back(long_settings, monkeypatch):
    """An evaluation after the resume that is worse than the best before it does not replace best/."""
    score_as(monkeypatch, [9.0, 2.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0])
    folder = stop_at(long_settings(run_name="a"), 6)
    best = weights(folder, "best")
    run(long_settings(resume=True))
    assert all(torch.equal(best[name], tensor) for name, tensor in weights(folder, "best").items())


def test_hopeless_steps_are_counted_over_a_resume(long_settings, monkeypatch):
    cross_entropy = torch.nn.functional.cross_entropy

    def poisoned(*arguments, **options):
        return cross_entropy(*arguments, **options) * (torch.nan if torch.is_grad_enabled() else 1)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", poisoned)
    stop_at(long_settings(run_name="a"), 3)
    with pytest.raises(UserError, match="5 steps in a row, up to step 5"):
        train.main(long_settings(resume=True))
    with pytest.raises(UserError, match="Begin a new run"):  # and not a step more
        train.main(long_settings(resume=True))
