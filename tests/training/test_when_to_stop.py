"""A constant learning rate: where it begins to fall, by plan or early, and how a run that ended so is extended."""

import json
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from accelerate import Accelerator
from runs import (
    assert_close,
    assert_same_bits,
    checkpoint,
    checkpoints,
    finish,
    folder_of,
    fork_ranks,
    fork_run,
    metrics,
    run,
    score_as,
    stop_at,
)
from scipy.stats import ttest_1samp
from transformers import AutoModelForMaskedLM, AutoTokenizer

import train
from mlm.errors import UserError
from mlm.evaluation.loss import Evaluation
from mlm.report.summary import read_summary
from mlm.training import checkpoint as training_checkpoint
from mlm.training import endings
from mlm.training import step as training_step
from mlm.training.plan import Plan
from mlm.training.progress import Progress
from mlm.training.run import Setup

CONSTANT = {"schedule": "constant", "num_warmup_steps": 3, "save_every": 17}
EARLY = CONSTANT | {"early_stop_evals": 4, "max_steps": 60}  # none gains surely, so that of step 16 is the fourth
LATER = {"save_every": 5, "num_warmup_steps": 0.2}  # what may be given to a run that goes on

# ---------------------------------------------------------------------------------------------------- a sure gain


def setup_of(patience: int) -> Setup:
    """A run of 1000 steps, ten of which are warm-up, that is evaluated after every five."""
    plan = Plan(1000, 1000, 10, 909, 1.0, 5, None, 1, 1, 1, 1)
    return cast(Any, Setup)(SimpleNamespace(early_stop_evals=patience), plan, Path(), None, {}, {}, "")


def stops_at(evaluations: list[Evaluation], patience: int) -> tuple[int | None, Progress]:
    """The step after which the evaluations, that of the baseline first, begin the cool-down."""
    setup, learner = setup_of(patience), cast(Any, SimpleNamespace(accelerator=Accelerator()))
    progress = Progress(baseline=evaluations[0], sampled_chunks=len(evaluations[0].losses))
    for progress.step, evaluation in enumerate(evaluations):
        progress.step *= 5
        changed = endings.stop_early(setup, progress, learner, evaluation)
        if changed is not setup:
            assert changed.plan == replace(setup.plan, decay_from=progress.step, steps=changed.plan.steps)
            assert progress.cooldown_from == progress.step
            return progress.step, progress
    assert progress.cooldown_from is None
    return None, progress


def draw_evaluations(seed: int, fall: float) -> list[Evaluation]:
    """31 evaluations of 50 lines, whose true loss falls by so much from each to the next."""
    draw, ones, lines = np.random.default_rng(seed), np.ones(50), np.arange(50, dtype=np.uint64)
    hardness = draw.normal(3.0, 1.0, 50)
    losses = [hardness - fall * number + draw.normal(0.0, 0.3, 50) for number in range(31)]
    return [Evaluation(each, ones, ones, lines) for each in losses]


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_it_stops_after_so_many_evaluations_in_a_row_without_a_sure_gain_and_not_before(patience):
    stopped = []
    for seed in range(60):
        evaluations = draw_evaluations(seed, fall=seed % 3 * 0.03)
        gained, without, expected = evaluations[0].losses, 0, None
        for number, evaluation in enumerate(evaluations[1:], start=1):
            high = ttest_1samp(evaluation.losses - gained, 0.0).confidence_interval(0.95).high
            if high < 0:
                gained, without = evaluation.losses, 0
            elif number * 5 > 10:  # after the warm-up
                without += 1
            if without == patience:
                expected = number * 5
                break
        assert stops_at(evaluations, patience)[0] == expected, seed
        stopped.append(expected)
    assert len(set(stopped)) >= 3 and (patience < 5 or None in stopped)


def test_a_loss_that_falls_slowly_but_surely_is_not_stopped():
    """No evaluation is surely better than the best before it, but every third than that three before."""
    ones, lines = np.ones(100), np.arange(100, dtype=np.uint64)
    swings = 0.3 * np.where(np.arange(100) % 2, 1.0, -1.0)  # of a line's loss, from each evaluation to the next
    falling = [Evaluation(5 - 0.04 * n + swings * (n % 2), ones, ones, lines) for n in range(40)]
    assert ttest_1samp(falling[1].losses - falling[0].losses, 0.0).confidence_interval(0.95).high > 0
    assert stops_at(falling, patience=3)[0] is None
    level = [Evaluation(5 + swings * (n % 2), ones, ones, lines) for n in range(40)]
    assert stops_at(level, patience=3)[0] == 25  # after those of steps 15, 20 and 25, as 5 and 10 were warm-up


def test_one_line_of_test_text_shows_no_gain_and_nan_none():
    for losses in (np.arange(9.0, 0.0, -1.0), np.full(9, np.nan)):
        lines = [Evaluation(np.full(2, loss), np.ones(2), np.ones(2), np.zeros(2, np.uint64)) for loss in losses]
        assert stops_at(lines, patience=2)[0] == 20


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def finished_runs(module_settings):
    """By name, the folder of a run: of 18 steps; of 60 that stops early; of 29; nothing interrupted them."""
    return {
        "planned": run(module_settings(run_name="planned", max_steps=18, **CONSTANT)),
        "early": run(module_settings(run_name="early", **EARLY)),
        "longer": run(module_settings(run_name="longer", max_steps=29, **CONSTANT)),
    }


@pytest.fixture
def copy_of(finished_runs, long_settings):
    """Copies one of them to where a test may go on with it."""

    def copy(name: str) -> Path:
        return shutil.copytree(finished_runs[name], Path(long_settings().path_model_save) / name)

    return copy


def test_a_run_that_stops_early_is_one_that_was_planned_so(finished_runs):
    """It ends after 16 steps and a tenth of them, with the bits of a run of so many."""
    assert_same_bits(finished_runs["early"], finished_runs["planned"])
    assert [row["step"] for row in metrics(finished_runs["early"])][-1] == "18"


def test_rates_are_constant_until_the_cooldown(finished_runs):
    rates = {int(row["step"]): float(row["lr"]) for row in metrics(finished_runs["early"]) if row["lr"]}
    assert rates == pytest.approx(dict.fromkeys((3, 6, 9, 12, 15), 2e-3) | {18: 2e-3 / 2})


def kill_in_step(number):
    """Has this process kill itself when it begins a step."""
    take_step = training_step.take_step

    def watched(learner, progress, *others):
        if progress.step + 1 == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(learner, progress, *others)

    training_step.take_step = watched


def kill_in_save(step):
    """Has this process kill itself when it begins to save the checkpoint of a step."""
    save_checkpoint = training_checkpoint.save_checkpoint

    def watched(setup, learner, tokenizer, progress):
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return save_checkpoint(setup, learner, tokenizer, progress)

    training_checkpoint.save_checkpoint = watched


KILLS = {
    "in the step before": partial(kill_in_step, 16),
    "when it was decided": partial(kill_in_save, 16),
    "after its first step": partial(kill_in_step, 18),
}


@pytest.mark.parametrize("when", KILLS)
def test_killed_around_an_early_stop_it_ends_with_the_same_bits(long_settings, finished_runs, when):
    config = long_settings(run_name="killed", resume=True, **EARLY)
    killed = fork_run(config, KILLS[when])
    assert finish(killed, -signal.SIGKILL) and not (folder_of(config) / "final").exists()
    said, _ = finish(fork_run(config))
    assert ("saw no sure gain since" in said) == (when != "after its first step")  # which is in the checkpoint
    assert_same_bits(folder_of(config), finished_runs["early"])


def test_a_signal_in_the_step_before_an_early_stop_leaves_a_checkpoint_that_learns_of_it(long_settings, finished_runs):
    folder = stop_at(long_settings(run_name="a", **EARLY), 16)

    def cooldown_from():
        return json.loads((checkpoint(folder, 16) / "state.json").read_text())["progress"]["cooldown_from"]

    assert cooldown_from() is None  # it was not evaluated any more
    run(long_settings(resume=True, **EARLY))
    assert cooldown_from() == 16
    assert_same_bits(folder, finished_runs["early"])


def test_what_was_gained_comes_back(long_settings, monkeypatch):
    """Else the evaluation of step 12 would be compared with the baseline, which it surely beats."""
    score_as(monkeypatch, [6.0, 5.0, 5.0, 5.0, 4.0])  # before training and after steps 4, 8 and 12, and at the end
    config = long_settings(run_name="a", **EARLY | {"early_stop_evals": 2})
    folder = stop_at(config, 9)
    run(replace(config, resume=True))
    assert metrics(folder)[-1]["step"] == "14"


@pytest.mark.slow
def test_two_ranks_stop_alike_even_where_one_computes_otherwise(long_settings):
    config = long_settings(run_name="two", **EARLY | {"hidden_dropout": 0.0, "attention_dropout": 0.0})
    ranks = fork_ranks(config, 2, {1: gain_always})
    one = run(replace(config, run_name="one"))
    for rank in ranks:
        finish(rank)
    assert_close(one.with_name("two"), one)
    assert [row["step"] for row in metrics(one)] == [row["step"] for row in metrics(one.with_name("two"))]
    assert metrics(one)[-1]["step"] == "18"


def gain_always():
    endings.compare = lambda *_: SimpleNamespace(high=-1.0)


@pytest.mark.parametrize("steps", [1, 2, 5, 11])
def test_the_shortest_runs(long_settings, steps):
    folder = run(long_settings(max_steps=steps, eval_every=1, save_every=None, schedule="constant", early_stop_evals=1))
    assert 1 <= int(metrics(folder)[-1]["step"]) <= steps and (folder / "final").exists()


# --------------------------------------------------------------------------------------------------------- extended


def test_an_extended_run_is_one_that_was_longer_from_the_start(long_settings, copy_of, finished_runs, capsys):
    folder = copy_of("planned")
    assert checkpoints(folder) == [16, 17]
    before = {name: (folder / name / "model.safetensors").read_bytes() for name in ("final", "best")}
    stop_at(long_settings(resume=True, run_name="planned", max_steps=29, **CONSTANT), 22)
    assert "extended to 29 steps, from step 16, before the learning rate fell" in capsys.readouterr().out
    kept = {name: (folder / f"{name}-18" / "model.safetensors").read_bytes() for name in before}
    assert kept == before and not (folder / "final").exists()
    run(long_settings(resume=True, max_steps=29, **CONSTANT))  # finds it, as it is not finished any more
    assert_same_bits(folder, finished_runs["longer"])


@pytest.mark.parametrize("when", [18, 22])
def test_an_extension_that_is_killed_ends_with_the_same_bits(long_settings, copy_of, finished_runs, when):
    """Before its first checkpoint, when the newest is one of the cool-down of before, and after it."""
    folder = copy_of("planned")
    config = long_settings(resume=True, run_name="planned", max_steps=29, **CONSTANT | LATER)
    finish(fork_run(config, partial(kill_in_step, when)), -signal.SIGKILL)
    assert read_summary(folder).state == "interrupted"
    run(replace(config, run_name=None))
    assert_same_bits(folder, finished_runs["longer"])
    saved = json.loads((folder / "settings.json").read_text())["settings"]
    assert saved["num_warmup_steps"] == 3  # that it had, though a fifth of 29 would be 6


def test_an_early_stop_is_forgotten_by_an_extension(long_settings, copy_of):
    folder = copy_of("early")
    stop_at(long_settings(resume=True, **EARLY | {"max_steps": 70}), 25)  # finds the finished run
    rates = {int(row["step"]): float(row["lr"]) for row in metrics(folder) if row["lr"]}
    assert rates[18] == rates[21] == rates[24] == 2e-3
    state = json.loads((checkpoint(folder, 25) / "state.json").read_text())["progress"]
    assert state["cooldown_from"] is None and state["evaluations_without_gain"] == 2  # those of steps 20 and 24


def test_best_is_again_that_of_before_the_cooldown(long_settings, monkeypatch):
    """A run that is longer from the start would have no other."""
    score_as(monkeypatch, [6.0, 5.0, 4.0, 3.0])  # before training and after steps 4, 8 and 12
    config = long_settings(run_name="a", max_steps=12, **CONSTANT)
    folder = stop_at(config, 9)
    best = (folder / "best" / "model.safetensors").read_bytes()
    run(replace(config, resume=True))
    assert (folder / "best" / "model.safetensors").read_bytes() != best
    stop_at(replace(config, resume=True, max_steps=22), 11)
    assert (folder / "best" / "model.safetensors").read_bytes() == best
    assert AutoModelForMaskedLM.from_pretrained(folder / "best") and AutoTokenizer.from_pretrained(folder / "best")
    assert {path.name for path in (folder / "best").iterdir()} == {path.name for path in (folder / "best-12").iterdir()}


def test_the_checkpoint_before_the_cooldown_stays(long_settings):
    changes = {"max_steps": 22, "keep_checkpoints": 1, "save_every": 7}
    folder = run(long_settings(run_name="a", **CONSTANT | changes))
    assert checkpoints(folder) == [20, 21]


# ----------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_steps": 18}, "is finished; its model is .*final; a larger num_epochs or max_steps extends it"),
        ({"max_steps": 17}, "max_steps: 18 when the run began, 17 now"),
        ({"max_steps": 40, "seed": 1}, "seed: 42 when the run began, 1 now"),
        ({"max_steps": 40, "schedule": "linear"}, "schedule: constant when the run began, linear now"),
        ({"max_steps": 18, "num_warmup_steps": 2}, "is finished"),
    ],
)
def test_what_is_no_extension_is_refused(long_settings, copy_of, changes, said):
    folder = copy_of("planned")
    with pytest.raises(UserError, match=f"(?s)resume: .*{said}"):
        train.main(long_settings(run_name="planned", resume=True, **CONSTANT | changes))
    assert (folder / "final").exists() and checkpoints(folder) == [16, 17]


def test_without_a_checkpoint_from_before_the_cooldown_a_finished_run_stays_as_it_is(long_settings, copy_of):
    folder = copy_of("planned")
    shutil.rmtree(checkpoint(folder, 16))
    with pytest.raises(UserError, match="is finished; no checkpoint from before its cool-down is left"):
        train.main(long_settings(run_name="planned", resume=True, max_steps=40, **CONSTANT))
    shutil.rmtree(checkpoint(folder, 17))
    with pytest.raises(UserError, match="is finished; no checkpoint"):
        train.main(long_settings(run_name="planned", resume=True, max_steps=18, **CONSTANT))
    assert (folder / "final").exists()


def test_a_linear_run_is_not_extended(long_settings, whole):
    folder = shutil.copytree(whole, Path(long_settings().path_model_save) / "whole")
    with pytest.raises(UserError, match=r"whole is finished; .*one with --schedule constant can be"):
        train.main(long_settings(run_name="whole", resume=True, max_steps=40))
    (folder / "final").rename(folder / "elsewhere")
    with pytest.raises(UserError, match=r"(?s)max_steps: 26 when the run began, 40 now.*One with --schedule constant"):
        train.main(long_settings(run_name="whole", resume=True, max_steps=40))


def test_evaluations_that_decide_the_training_may_not_change(long_settings):
    stop_at(long_settings(run_name="a", **EARLY), 6)
    with pytest.raises(UserError, match="eval_every: 4 when the run began, 5 now"):
        train.main(long_settings(resume=True, **EARLY | {"eval_every": 5}))
