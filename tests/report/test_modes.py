"""What a run does beside training: a dry run, an evaluation alone, and what it tells metrics."""

import io
import re
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from runs import contents, metrics, run, stop_at
from safetensors.torch import load_file, save_file

import train
from mlm import terminal
from mlm.errors import UserError
from mlm.report import dry_run
from mlm.runtime import hub
from mlm.terminal import prepare_output, say
from mlm.training import checkpoint


def test_a_dry_run_says_what_a_run_takes_and_keeps_nothing_but_the_cache(settings, monkeypatch, capsys):
    monkeypatch.setattr(dry_run, "TIMED_SECONDS", 0.1)
    config = settings(dry_run=True, num_epochs=4, save_every=5)
    train.main(settings(check_only=True))
    cache = contents(Path(config.path_model_save))
    capsys.readouterr()
    train.main(config)
    assert contents(Path(config.path_model_save)) == cache
    screen = capsys.readouterr().out
    assert re.search(r"^text +120 training lines of [\d,]+ tokens, 40 test lines$", screen, re.M)
    assert re.search(r"^steps +48 of 16 chunks, 4 epochs, on 1 x cpu, no$", screen, re.M)
    for what in (
        r"speed +[\d,]+ tokens/s",
        r"time +\d\d:\d\d: start .* 5 evaluation\(s\) .* 12 checkpoint\(s\)",
        r"memory +\d",
        r"disk +\d",
    ):
        assert re.search(f"^{what}", screen, re.M), what
    assert "0 of the" not in screen and len(screen.splitlines()) < 45  # one screen


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_an_estimate_counts_what_a_run_then_does(settings, monkeypatch, schedule):
    """Steps, evaluations, test chunks, checkpoints and bytes: each as the run itself has them."""
    monkeypatch.setattr(dry_run, "TIMED_SECONDS", 0.1)
    estimates = []
    monkeypatch.setattr(dry_run, "describe_estimate", lambda run, estimate: estimates.append(estimate) or "")
    usual = {"max_steps": 26, "eval_every": 4, "save_every": 5, "keep_checkpoints": 2, "schedule": schedule}
    if schedule == "constant":  # it keeps that of step 40, and that of step 42
        usual |= {"max_steps": 44, "save_every": 7, "keep_checkpoints": 1}
    train.main(settings(dry_run=True, **usual))
    saved, save_checkpoint = [], checkpoint.save_checkpoint

    def watched(setup, learner, tokenizer, progress):
        saved.append(progress.step)
        save_checkpoint(setup, learner, tokenizer, progress)

    monkeypatch.setattr(checkpoint, "save_checkpoint", watched)
    folder = run(settings(run_name="whole", **usual))
    [estimate] = estimates
    scored = [int(row["test_chunks"]) for row in metrics(folder) if row["test_chunks"]]
    assert estimate.left[:3] == (len(scored), sum(scored), len(saved))
    size = sum(len(content) for content in contents(folder).values())
    assert estimate.disk_bytes == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"schedule": "constant"}, "at a constant learning rate until step 10\n"),
        ({"schedule": "constant", "early_stop_evals": 3}, "until step 10; fewer where an early stop comes\n"),
    ],
)
def test_a_dry_run_says_where_the_learning_rate_falls(settings, monkeypatch, capsys, changes, said):
    monkeypatch.setattr(dry_run, "TIMED_SECONDS", 0.1)
    train.main(settings(dry_run=True, max_steps=11, **changes))
    screen = capsys.readouterr().out
    assert said in screen and ("constant learning rate" in screen) == bool(said)


def test_a_dry_run_of_the_shortest_run(settings, capsys):
    train.main(settings(dry_run=True, max_steps=1))
    assert "steps     1 of 16 chunks" in capsys.readouterr().out


def test_a_dry_run_whose_steps_are_all_skipped_says_so(settings, monkeypatch):
    def skip(learner, progress, *others):
        progress.step += 1
        progress.since_last_log.steps += 1
        progress.since_last_log.seconds += 0.1

    monkeypatch.setattr(dry_run, "take_step", skip)
    with pytest.raises(UserError, match="learning_rate: no step of the dry run had a finite loss and gradient"):
        train.main(settings(dry_run=True))


def test_evaluate_only_scores_any_checkpoint_on_any_text_and_trains_nothing(settings, tmp_path, capsys):
    trained = run(settings(run_name="trained", max_steps=8))
    (tmp_path / "other").mkdir()
    test = (tmp_path / "text" / "test.txt").read_text(encoding="utf-8")
    (tmp_path / "other" / "test.txt").write_text(test, encoding="utf-8")
    (tmp_path / "other" / "train.txt").write_bytes(b"\xff is no text, and nobody tokenizes it")
    start = str(trained / "final")
    only = {"initial_pretrain_model": start, "initial_pretrain_tokenizer": start, "evaluate_only": True}
    capsys.readouterr()
    folder = run(settings(run_name="scored", path_datasets=str(tmp_path / "other"), **only))
    [row], last = metrics(folder), metrics(trained)[-1]
    for name in ("eval_loss", "eval_loss_se", "test_chunks"):
        assert float(row[name]) == pytest.approx(float(last[name]), abs=1e-5)
    assert not (folder / "final").exists() and not (folder / "checkpoints").exists()
    output = capsys.readouterr().out
    assert "   train " not in output
    warnings = re.findall("warning: (.*):", output)  # of eight steps
    assert {*warnings} <= {"the start knows nothing of this text"}
    with pytest.raises(UserError, match="no unfinished run"):
        run(settings(resume=True))


@pytest.mark.parametrize("spoilt", ["head", "tokens", None])
def test_a_start_that_knows_nothing_is_said_before_it_is_trained(settings, tmp_path, whole, capsys, spoilt):
    """A head that is in the file and random; rows that belong to other tokens."""
    shutil.copytree(whole / "final", tmp_path / "start")
    weights = load_file(tmp_path / "start" / "model.safetensors")
    torch.manual_seed(0)
    if spoilt == "head":
        torch.nn.init.normal_(weights["cls.predictions.transform.dense.weight"])
        torch.nn.init.zeros_(weights["cls.predictions.bias"])
    if spoilt == "tokens":
        rows = weights["bert.embeddings.word_embeddings.weight"]
        weights["bert.embeddings.word_embeddings.weight"] = 3 * rows[torch.randperm(len(rows))]
    save_file(weights, tmp_path / "start" / "model.safetensors", metadata={"format": "pt"})
    name = str(tmp_path / "start")
    run(settings(initial_pretrain_model=name, initial_pretrain_tokenizer=name, evaluate_only=True))
    first, *rest = capsys.readouterr().out.partition("before training")[2].splitlines()
    assert "perplexity" in first
    assert rest[0].startswith("warning: the start knows nothing of this text") == bool(spoilt)


def test_modes_exclude_each_other(settings):
    with pytest.raises(UserError, match="dry_run, evaluate_only: choose one"):
        settings(dry_run=True, evaluate_only=True)
    with pytest.raises(UserError, match="dry_run, resume: choose one"):
        settings(dry_run=True, resume=True)


# ------------------------------------------------------------------------------------------------------------ trackers


def test_a_tracker_that_is_not_installed_is_said_plainly(settings, monkeypatch):
    monkeypatch.setattr("mlm.report.metrics.get_available_trackers", lambda: [])
    with pytest.raises(UserError, match="tracker: wandb is not installed; pip install wandb, or --tracker none"):
        train.main(settings(tracker="wandb"))


def test_a_tracker_that_cannot_start_is_said_plainly(settings, monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise RuntimeError("No API key configured.\nmore")

    monkeypatch.setattr("mlm.report.metrics.check_tracker", lambda name: None)
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", fail)
    with pytest.raises(UserError, match=r"tracker: tensorboard could not start \(No API key configured\.\)"):
        train.main(settings(tracker="tensorboard", run_name="mine"))
    assert not (tmp_path / "output" / "mine").exists()  # so that the same command can be given again


def test_a_tracker_goes_on_at_the_step_after_the_checkpoint(long_settings, monkeypatch):
    given = []
    start = Accelerator.init_trackers

    def watched(self, project, config, init_kwargs):
        given.append((config["seed"], init_kwargs))
        start(self, project, config=config, init_kwargs=init_kwargs)

    monkeypatch.setattr(Accelerator, "init_trackers", watched)
    stop_at(long_settings(run_name="mine", tracker="tensorboard"), 8)
    run(long_settings(run_name="mine", tracker="tensorboard", resume=True, max_steps=26))
    assert given == [(42, {"tensorboard": {"purge_step": 0}}), (42, {"tensorboard": {"purge_step": 9}})]


def test_nothing_of_a_tracker_is_imported_unless_it_is_named():
    assert not {"wandb", "mlflow", "swanlab", "trackio"} & sys.modules.keys()


# ----------------------------------------------------------------------------------------------------- push to the Hub


class StubApi:
    """Takes what is uploaded, or fails as a network does."""

    calls: ClassVar[list] = []
    error: ClassVar[Exception | None] = None

    def create_repo(self, name, **options):
        if self.error:
            raise self.error
        self.calls.append((name, options))
        return f"https://hub/{name}"

    def upload_folder(self, repo_id, folder_path):
        self.calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_push_to_hub_uploads_the_finished_model_privately_and_a_failure_loses_nothing(settings, monkeypatch, capsys):
    monkeypatch.setattr("mlm.runtime.hub.HfApi", StubApi)
    folder = run(settings(run_name="pushed", max_steps=2, push_to_hub="me/bert"))
    (created, options), (uploaded, files) = StubApi.calls
    assert created == uploaded == "me/bert" and options["private"] is True
    assert {"README.md", "config.json", "model.safetensors", "vocab.txt"} <= set(files)
    assert "predictions.csv" not in files  # which quotes the text
    assert "Pushed to https://hub/me/bert" in capsys.readouterr().out
    monkeypatch.setattr(StubApi, "error", ConnectionError("no network\nmore"))
    folder = run(settings(run_name="kept", max_steps=2, push_to_hub="me/bert"))
    assert (folder / "final" / "model.safetensors").exists()
    output = capsys.readouterr().out
    assert f"not pushed to the Hub (no network). It is whole in {folder / 'final'}" in output
    assert f"hf upload me/bert {folder / 'final'}" in output


def test_push_to_hub_is_refused_before_training_where_it_cannot_work(monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="push_to_hub: nobody is logged in"):
        hub.check_push("me/bert")
    with pytest.raises(UserError, match="no name the Hugging Face Hub could have"):
        hub.check_push("me/bert/more")
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    hub.check_push("me/bert")


# ---------------------------------------------------------------------------------------------------------------- bars


def test_a_bar_is_lines_in_a_file(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.0)
    with terminal.progress_bar("reading", 1000, "B") as bar:
        for _ in range(4):
            bar.update(250)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("%")[0].split()[-1] for line in lines] == ["0", "25", "50", "75", "100"]
    with terminal.progress_bar("reading", 1000, "B", shown=False) as bar:
        bar.update(1000)
    assert capsys.readouterr().err == ""


def test_a_terminal_that_lacks_characters_shows_their_numbers(settings, monkeypatch):
    """A run whose screen has a plus-minus sign and Chinese words does not end at the first of them."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    folder = run(settings(max_steps=2))
    assert rb"\xb1" in shown.getvalue() and (folder / "final").exists()


def test_output_that_is_no_file_as_a_notebooks_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    prepare_output()
    say("±")
    assert sys.stdout.getvalue() == "±\n"
