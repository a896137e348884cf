"""Law 5: interrupted equals uninterrupted; and what cannot be resumed is refused by name."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from runs import assert_same_bits, finish, metrics, read_until, run, start, untimed, weights
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

import data_process
import train
from mlm import checkpoint, training
from mlm.errors import UserError
from mlm.evaluation import Evaluation
from mlm.storage import lock
from mlm.vocabulary import learn_tokenizer


@pytest.fixture
def long_settings(settings):
    """Dropout on; reports, evaluations, checkpoints and epochs end at different steps."""

    def make(**changes):
        usual = {"max_steps": 26, "log_every": 3, "eval_every": 4, "save_every": 5, "attention_dropout": 0.1}
        return settings(**(usual | {"micro_batch_tokens": 128} | changes))

    return make


@pytest.fixture
def interrupt(monkeypatch):
    """Has this process send itself a signal while it draws the given training (or evaluation) batch."""
    accumulate_gradients, content_keys = training.accumulate_gradients, data_process.content_keys

    def arm(number, of_training=True, signals=(signal.SIGTERM,)):
        calls = []

        def count():
            calls.append(None)
            if len(calls) == number:
                for each in signals:
                    os.kill(os.getpid(), each)

        def watched_step(*arguments):
            if of_training:
                count()
            return accumulate_gradients(*arguments)

        def watched_evaluation(*arguments):
            if not of_training:
                count()
            return content_keys(*arguments)

        monkeypatch.setattr(training, "accumulate_gradients", watched_step)
        monkeypatch.setattr(data_process, "content_keys", watched_evaluation)

    return arm


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def test_killed_five_times_it_ends_with_the_same_bits(long_settings):
    """kill -9 at random moments, each after another random step was reported, before the first checkpoint or after."""
    config = long_settings(run_name="whole", max_steps=60, log_every=1)
    finish(start(config))
    seed = random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    print(f"seed {seed}")  # of the moments
    config = long_settings(run_name="killed", max_steps=60, log_every=1, resume=True)
    for step in sorted(draw.sample(range(1, 58), 5)):
        process = start(config)
        read_until(process, *(f"step {later}/60, epoch" for later in range(step, 60)))  # it may resume after `step`
        time.sleep(draw.uniform(0, 0.03))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    out, _ = finish(start(config))
    assert "resumed from" in out
    output = Path(config.path_model_save)
    assert_same_bits(output / "killed", output / "whole")
    assert len(metrics(output / "whole")) == 61


@pytest.mark.parametrize(
    ("number", "of_training", "stopped_at", "kind", "status"),
    [
        (1, True, 1, signal.SIGTERM, 143),  # before the first checkpoint
        (8, True, 8, signal.SIGINT, 130),  # when an evaluation is due
        (10, True, 10, signal.SIGTERM, 143),  # when a checkpoint is due
        (12, True, 12, signal.SIGTERM, 143),  # when a row and an evaluation are due
        (26, True, 26, signal.SIGINT, 130),  # in the last step
        (1, False, 0, signal.SIGINT, 130),  # in the evaluation of the start
        (4, False, 12, signal.SIGTERM, 143),  # in a later evaluation
    ],
)
def test_a_signal_ends_the_step_saves_and_the_run_goes_on(
    long_settings, interrupt, monkeypatch, capsys, number, of_training, stopped_at, kind, status
):
    whole = run(long_settings(run_name="whole"))
    with monkeypatch.context():
        interrupt(number, of_training, (kind,))
        with pytest.raises(SystemExit) as stopped:
            train.main(long_settings(run_name="stopped"))
    assert stopped.value.code == status
    folder = whole.with_name("stopped")
    assert checkpoints(folder)[-1] == stopped_at and not (folder / "final").exists()
    assert f"stopped after step {stopped_at}" in capsys.readouterr().out
    interrupt(-1)
    run(long_settings(resume=True))  # finds the unfinished run by itself
    assert_same_bits(folder, whole)


def test_the_gradient_scaler_comes_back(long_settings, interrupt, monkeypatch):
    """float16 with a scaler that overflows and grows again every few steps, on the CPU."""

    class Scaled(Accelerator):
        def __init__(self, mixed_precision, **options):
            super().__init__(mixed_precision="fp16", **options)
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4)

    monkeypatch.setattr("mlm.ranks.Accelerator", Scaled)
    whole = run(long_settings(run_name="whole", max_steps=14))
    interrupt(10)
    with pytest.raises(SystemExit):
        train.main(long_settings(run_name="a", max_steps=14))
    folder = whole.with_name("a")
    scaler = json.loads((folder / "checkpoints" / "step-00000010" / "state.json").read_text())["scaler"]
    assert scaler["scale"] not in (0, 2.0**20) and scaler["_growth_tracker"] > 0  # neither fresh nor just halved
    interrupt(-1)
    train.main(long_settings(resume=True, max_steps=14))
    assert_same_bits(folder, whole)


def test_an_evaluation_is_given_up_when_a_signal_comes(long_settings, interrupt, monkeypatch):
    monkeypatch.setattr(data_process, "EVALUATION_CHUNKS", 1)
    calls = []
    forward = train.PackedMaskedLM.forward

    def watched(self, *arguments, **inputs):
        calls.append(self.training)
        return forward(self, *arguments, **inputs)

    monkeypatch.setattr(train.PackedMaskedLM, "forward", watched)
    interrupt(3, of_training=False)
    with pytest.raises(SystemExit):
        train.main(long_settings())
    assert calls == [False] * 2  # it came while the third batch was drawn


def test_a_checkpoint_is_not_written_again_where_nothing_was_trained(long_settings, interrupt):
    interrupt(8)
    with pytest.raises(SystemExit):
        train.main(long_settings(run_name="a"))
    path = Path(long_settings().path_model_save) / "a" / "checkpoints" / "step-00000008"
    written = path.stat().st_ino, (path / "state.json").stat().st_mtime_ns
    interrupt(1, of_training=False)  # the evaluation that was due after step 8
    with pytest.raises(SystemExit, match="143"):
        train.main(long_settings(resume=True))
    assert written == (path.stat().st_ino, (path / "state.json").stat().st_mtime_ns)


def test_a_second_sigterm_changes_nothing(long_settings, interrupt):
    """Launchers and schedulers send one each."""
    interrupt(8, signals=(signal.SIGTERM, signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        train.main(long_settings(run_name="twice"))
    assert checkpoints(Path(long_settings().path_model_save) / "twice")[-1] == 8


def test_rows_after_the_checkpoint_go(long_settings, interrupt):
    interrupt(9)
    with pytest.raises(SystemExit):
        train.main(long_settings(run_name="a", log_every=4))
    folder = Path(long_settings().path_model_save) / "a"
    rows = untimed(folder)
    assert [int(row["step"]) for row in rows] == [0, 4, 8]
    shutil.rmtree(folder / "checkpoints" / "step-00000009")  # as if killed in step 9
    interrupt(1)
    with pytest.raises(SystemExit):
        train.main(long_settings(resume=True, log_every=4))
    assert untimed(folder) == rows[:-1]
    interrupt(-1)
    train.main(long_settings(resume=True, log_every=4))
    assert untimed(folder)[: len(rows)] == rows
    steps = [int(row["step"]) for row in metrics(folder)]
    assert steps == sorted(set(steps)) and steps[-1] == 26


def test_a_checkpoint_is_a_plain_folder_with_a_manifest(long_settings, interrupt, monkeypatch):
    interrupt(23)
    with pytest.raises(SystemExit):
        train.main(long_settings(run_name="a", keep_checkpoints=3, max_steps=30))
    folder = Path(long_settings().path_model_save) / "a"
    assert checkpoints(folder) == [15, 20, 23]
    newest = folder / "checkpoints" / "step-00000023"
    manifest = json.loads((newest / "manifest.json").read_text())
    assert {path.name for path in newest.iterdir()} == {*manifest, "manifest.json"}
    for name, expected in manifest.items():
        assert (newest / name).stat().st_size == expected["bytes"]
    assert {path.suffix for path in newest.iterdir()} == {".safetensors", ".json", ".txt"}
    state = json.loads((newest / "state.json").read_text())
    assert state["recipe"]["settings"]["max_steps"] == 30 and state["progress"]["step"] == 23
    bert = AutoModelForMaskedLM.from_pretrained(newest)
    moments = load_file(newest / "optimizer.safetensors")
    trained = {name for name, _ in bert.named_parameters() if "key.bias" not in name and "pooler" not in name}
    assert {key.rpartition("/")[0] for key in moments} == trained
    assert {key.rpartition("/")[2] for key in moments} == {"step", "exp_avg", "exp_avg_sq"}


def damage(path: Path, how: str) -> None:
    weights = path / "model.safetensors"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "flipped":
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif how == "missing":
        (path / "optimizer.safetensors").unlink()
    elif how == "no manifest":
        (path / "manifest.json").unlink()
    elif how == "half a manifest":
        manifest = path / "manifest.json"
        manifest.write_text(manifest.read_text()[:-20])
    elif how == "empty manifest":
        (path / "manifest.json").write_text("{}")


@pytest.mark.parametrize("how", ["cut", "flipped", "missing", "no manifest", "half a manifest", "empty manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(long_settings, interrupt, capsys, how):
    whole = run(long_settings(run_name="whole"))
    interrupt(11)
    with pytest.raises(SystemExit):
        train.main(long_settings(run_name="a"))
    folder = whole.with_name("a")
    damage(folder / "checkpoints" / "step-00000011", how)
    interrupt(-1)
    train.main(long_settings(run_name="a", resume=True))
    output = capsys.readouterr().out
    assert f"warning: {folder / 'checkpoints' / 'step-00000011'} is skipped" in output
    assert f"resumed from {folder / 'checkpoints' / 'step-00000010'}" in output
    assert_same_bits(folder, whole)


def test_a_damaged_checkpoint_does_not_outlive_a_whole_one(long_settings, interrupt):
    interrupt(20)
    with pytest.raises(SystemExit):
        train.main(long_settings(run_name="a"))
    folder = Path(long_settings().path_model_save) / "a"
    damage(folder / "checkpoints" / "step-00000020", "cut")
    shutil.copytree(folder / "checkpoints" / "step-00000015", folder / "checkpoints" / "step-mine")  # a user's copy
    interrupt(2)
    with pytest.raises(SystemExit):
        train.main(long_settings(resume=True, save_every=1, keep_checkpoints=1))
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-00000017", "step-00000020", "step-mine"}
    assert checkpoint.find_checkpoint(folder)[0].name == "step-00000017"


def test_a_checkpoint_of_another_version_is_refused(stopped):
    path = Path(stopped().path_model_save) / "a" / "checkpoints" / "step-00000007"
    state = json.loads((path / "state.json").read_text()) | {"format": 0}
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text()) | {
        "state.json": checkpoint._measure(path / "state.json")
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="written by another version of this program"):
        train.main(stopped(resume=True))


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew(long_settings, interrupt):
    interrupt(11)
    with pytest.raises(SystemExit):
        train.main(long_settings(run_name="a"))
    folder = Path(long_settings().path_model_save) / "a"
    for path in (folder / "checkpoints").iterdir():
        damage(path, "cut")
    interrupt(-1)
    with pytest.raises(UserError, match=r"(?s)no checkpoint of .* is whole.*step-00000011.*step-00000010"):
        train.main(long_settings(run_name="a", resume=True))
    assert checkpoints(folder) == [10, 11]


@pytest.fixture
def stopped(long_settings, interrupt):
    """The settings of a run that was stopped after step 7."""
    interrupt(7)
    with pytest.raises(SystemExit):
        train.main(long_settings(run_name="a"))
    interrupt(-1)
    return long_settings


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 8}, "batch_size: 16 when the run began, 8 now"),
        ({"max_steps": 30}, "max_steps: 26 when the run began, 30 now"),
        ({"num_warmup_steps": 1}, "num_warmup_steps: 3 when the run began, 1 now"),
        ({"learning_rate": 1e-4}, "learning_rate: 0.002 when the run began, 0.0001 now"),
        ({"seed": 1}, "seed: 42 when the run began, 1 now"),
        ({"mixed_precision": "bf16"}, "mixed_precision: no when the run began, bf16 now"),
        ({"hidden_dropout": 0.0}, "hidden_dropout: None when the run began, 0.0 now"),
        ({"vocab_size": 200}, "vocab_size: 300 when the run began, 200 now"),
    ],
)
def test_a_setting_that_changes_training_is_refused_by_name(stopped, changes, named):
    folder = Path(stopped().path_model_save) / "a"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    AcceleratorState._reset_state()  # it keeps its first precision
    with pytest.raises(UserError, match=r"resume: .*step-00000007") as refused:
        train.main(stopped(resume=True, **changes))
    assert named in str(refused.value)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_setting_is_either_compared_or_free(stopped):
    """Whatever is added to Config.py later is compared, unless it is listed."""
    state = json.loads(next(Path(stopped().path_model_save).glob("a/checkpoints/*7/state.json")).read_text())
    assert state["recipe"]["settings"].keys() == vars(stopped()).keys() > checkpoint.MAY_CHANGE_ON_RESUME


@pytest.mark.parametrize("name", ["train.txt", "test.txt"])
def test_edited_text_is_refused(stopped, text_folder, name):
    path = text_folder / name
    path.write_text(path.read_text(encoding="utf-8").replace("患", "者", 1), encoding="utf-8")
    with pytest.raises(UserError, match="path_datasets: the text is not the one"):
        train.main(stopped(resume=True))


def test_another_tokenizer_of_the_same_name_is_refused(stopped, tokenizer, tmp_path, interrupt):
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    changes = {"initial_pretrain_tokenizer": str(folder), "run_name": "local"}
    interrupt(2)
    with pytest.raises(SystemExit):
        train.main(stopped(**changes))
    interrupt(-1)
    learn_tokenizer(lambda: iter(["another text"] * 2), 300).save_pretrained(folder)
    with pytest.raises(UserError, match="initial_pretrain_tokenizer: the tokenizer is not the one"):
        train.main(stopped(resume=True, **changes))


def test_with_words_of_ones_own_it_resumes_to_the_same_bits_and_refuses_other_words(long_settings, interrupt, tmp_path):
    for name, words in (("add", "glimepiride\n治疗糖尿病\n"), ("user", "服用二甲双胍\n")):
        (tmp_path / f"{name}.txt").write_text(words, encoding="utf-8")
    changes = {f"{name}_words": str(tmp_path / f"{name}.txt") for name in ("add", "user")}
    whole = run(long_settings(run_name="whole", mask_span=True, **changes))
    interrupt(7)
    with pytest.raises(SystemExit):
        train.main(long_settings(run_name="a", mask_span=True, **changes))
    interrupt(-1)
    for name, message in (
        ("add", "initial_pretrain_tokenizer: the tokenizer is not the one that the run began with, or add_words"),
        ("user", "user_words: its words are not those"),
    ):
        (tmp_path / "other.txt").write_text("治疗高血压\n", encoding="utf-8")
        with pytest.raises(UserError, match=message):
            train.main(
                long_settings(
                    run_name="a",
                    mask_span=True,
                    resume=True,
                    **changes | {f"{name}_words": str(tmp_path / "other.txt")},
                )
            )
    for name in ("add", "user"):
        (tmp_path / f"{name}.txt").rename(tmp_path / f"moved-{name}.txt")
    changes = {f"{name}_words": str(tmp_path / f"moved-{name}.txt") for name in ("add", "user")}
    train.main(long_settings(run_name="a", mask_span=True, resume=True, **changes))
    assert_same_bits(whole, whole.parent / "a")


def test_what_does_not_change_training_may_change(stopped, text_folder, tmp_path):
    whole = run(stopped(run_name="whole"))
    text_folder.rename(tmp_path / "elsewhere")
    Path(stopped().path_model_save).rename(tmp_path / "moved")
    changes = {"path_datasets": str(tmp_path / "elsewhere"), "path_model_save": str(tmp_path / "moved")}
    changes |= {"save_every": 2, "keep_checkpoints": 1, "log_every": 13}
    train.main(stopped(resume=True, **changes))
    folder = tmp_path / "moved" / "a"
    assert (folder / "final/model.safetensors").read_bytes() == (
        tmp_path / "moved" / whole.name / "final/model.safetensors"
    ).read_bytes()
    assert checkpoints(folder) == [24]


def test_the_newest_unfinished_run_is_resumed_or_the_one_named(stopped, interrupt, capsys):
    output = Path(stopped().path_model_save)
    interrupt(3)
    with pytest.raises(SystemExit):
        train.main(stopped(run_name="b"))
    interrupt(-1)
    run(stopped(run_name="finished", max_steps=1))
    (output / "unrelated").mkdir()
    for name in ("b", "a"):  # the newest first, then the only one left
        train.main(stopped(resume=True))
        assert f"resumed from {output / name}/checkpoints" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no unfinished run"):
        train.main(stopped(resume=True))
    with pytest.raises(UserError, match=r"a is finished; its model is .*a/final"):
        train.main(stopped(resume=True, run_name="a"))
    with pytest.raises(UserError, match="unrelated is not the folder of a run"):
        train.main(stopped(resume=True, run_name="unrelated"))
    train.main(stopped(resume=True, run_name="c", max_steps=1))  # none of that name: begun
    assert (output / "c" / "final").exists()


def test_a_run_at_work_is_not_resumed_by_another_process(stopped):
    folder = Path(stopped().path_model_save)
    with lock(folder / ".cache" / "a.lock"), pytest.raises(UserError, match="another process is at work"):
        train.main(stopped(resume=True))


def test_a_save_that_fails_leaves_the_checkpoint_before(long_settings, monkeypatch):
    saves = []

    def failing(tensors, path):
        saves.append(path)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")
        return save_file(tensors, path)

    save_file = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", failing)
    with pytest.raises(UserError, match=r"cannot write .*step-00000010: No space left on device"):
        train.main(long_settings(run_name="a"))
    folder = Path(long_settings().path_model_save) / "a"
    assert checkpoints(folder) == [5]
    assert checkpoint.find_checkpoint(folder)[0].name == "step-00000005"


def test_hopeless_steps_are_counted_over_a_resume(long_settings, interrupt, monkeypatch):
    cross_entropy = torch.nn.functional.cross_entropy

    def poisoned(*arguments, **options):
        return cross_entropy(*arguments, **options) * (torch.nan if torch.is_grad_enabled() else 1)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", poisoned)
    interrupt(3)
    with pytest.raises(SystemExit):
        train.main(long_settings(run_name="a"))
    interrupt(-1)
    with pytest.raises(UserError, match="5 steps in a row, up to step 5"):
        train.main(long_settings(resume=True))
    with pytest.raises(UserError, match="Begin a new run"):  # and not a step more
        train.main(long_settings(resume=True))


def test_the_best_value_comes_back(long_settings, interrupt, monkeypatch):
    """An evaluation after the resume that is worse than the best before it does not replace best/."""
    losses = iter([9.0, 2.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0])
    monkeypatch.setattr(train, "evaluate", lambda *arguments: (Evaluation(next(losses), 0.1, 10), False))
    interrupt(6)
    with pytest.raises(SystemExit):
        train.main(long_settings(run_name="a"))
    folder = Path(long_settings().path_model_save) / "a"
    best = weights(folder, "best")
    interrupt(-1)
    train.main(long_settings(resume=True))
    assert all(torch.equal(best[name], tensor) for name, tensor in weights(folder, "best").items())
