"""Laws 5 and 8: which run is resumed, what may change by then, and what may not and is refused by name."""

import json
import os
import shutil
from pathlib import Path

import pytest
from runs import checkpoint, checkpoints, contents, folder_of, run, stop_at
from safetensors.torch import load_file, save_file

import train
from mlm.data.tokenizer import learn_tokenizer
from mlm.errors import UserError
from mlm.storage import lock
from mlm.training import checkpoint as training_checkpoint
from mlm.training.run_folder import find_run


@pytest.fixture(scope="module")
def stopped_after_7(module_settings):
    return stop_at(module_settings(run_name="a"), 7)


@pytest.fixture
def stopped(stopped_after_7, long_settings):
    """The settings of a run "a" that was stopped after step 7."""
    shutil.copytree(stopped_after_7.parent, long_settings().path_model_save)
    return long_settings


# ------------------------------------------------------------------------------------------------------- what may not


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 8}, "batch_size: 16 when the run began, 8 now"),
        ({"max_steps": 30}, "max_steps: 26 when the run began, 30 now"),
        ({"num_warmup_steps": 1}, "num_warmup_steps: 3 when the run began, 1 now"),
        ({"learning_rate": 1e-4}, "learning_rate: 0.002 when the run began, 0.0001 now"),
        ({"seed": 1}, "seed: 42 when the run began, 1 now"),
        ({"mixed_precision": "bf16"}, "mixed_precision: no when the run began, bf16 now"),
        ({"hidden_dropout": 0.0}, "hidden_dropout: 0.1 when the run began, 0.0 now"),
        ({"vocab_size": 200}, "vocab_size: 300 when the run began, 200 now"),
    ],
)
def test_a_setting_that_changes_training_is_refused_by_name(stopped, changes, named):
    folder = folder_of(stopped(run_name="a"))
    before = contents(folder)
    with pytest.raises(UserError, match=r"resume: .*step-00000007") as refused:
        train.main(stopped(resume=True, **changes))
    assert named in str(refused.value)
    assert contents(folder) == before


def test_every_setting_is_either_compared_or_free(stopped):
    """Whatever is added to Config.py later is compared, unless it is listed."""
    state = json.loads((checkpoint(folder_of(stopped(run_name="a")), 7) / "state.json").read_text())
    assert state["recipe"]["settings"].keys() == vars(stopped()).keys() > training_checkpoint.MAY_CHANGE_ON_RESUME


@pytest.mark.parametrize("name", ["train.txt", "test.txt"])
def test_edited_text_is_refused(stopped, text_folder, name):
    path = text_folder / name
    path.write_text(path.read_text(encoding="utf-8").replace("患", "者", 1), encoding="utf-8")
    with pytest.raises(UserError, match="path_datasets: the text is not the one"):
        train.main(stopped(resume=True))


def test_another_tokenizer_of_the_same_name_is_refused(long_settings, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    changes = {"initial_pretrain_tokenizer": str(tmp_path / "tokenizer"), "run_name": "local"}
    stop_at(long_settings(**changes), 2)
    learn_tokenizer(lambda: iter(["another text"] * 2), 300).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="initial_pretrain_tokenizer: the tokenizer is not the one"):
        train.main(long_settings(resume=True, **changes))


def test_other_words_of_ones_own_are_refused(long_settings, tmp_path):
    for name, words in (("add", "glimepiride\n治疗糖尿病\n"), ("user", "服用二甲双胍\n"), ("other", "治疗高血压\n")):
        (tmp_path / f"{name}.txt").write_text(words, encoding="utf-8")
    words = {f"{name}_words": str(tmp_path / f"{name}.txt") for name in ("add", "user")}
    stop_at(long_settings(run_name="a", mask_span=True, **words), 2)
    for name, message in (
        ("add", "initial_pretrain_tokenizer: the tokenizer is not the one that the run began with, or add_words"),
        ("user", "user_words: its words are not those"),
    ):
        others = words | {f"{name}_words": str(tmp_path / "other.txt")}
        with pytest.raises(UserError, match=message):
            train.main(long_settings(run_name="a", mask_span=True, resume=True, **others))


def test_a_checkpoint_of_another_version_is_refused(stopped):
    path = checkpoint(folder_of(stopped(run_name="a")), 7)
    state = json.loads((path / "state.json").read_text()) | {"format": 0}
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state.json"] = training_checkpoint._measure(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="written by another version of this program"):
        train.main(stopped(resume=True))


# ----------------------------------------------------------------------------------------------------------- what may


def test_what_does_not_change_training_may_change(stopped, whole, text_folder, tmp_path):
    text_folder.rename(tmp_path / "elsewhere")
    Path(stopped().path_model_save).rename(tmp_path / "moved")
    changes = {"path_datasets": str(tmp_path / "elsewhere"), "path_model_save": str(tmp_path / "moved")}
    changes |= {"save_every": 2, "keep_checkpoints": 1, "log_every": 13}
    train.main(stopped(resume=True, **changes))
    folder = tmp_path / "moved" / "a"
    assert (folder / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()
    assert checkpoints(folder) == [24]


# -------------------------------------------------------------------------------------------------- which run is found


@pytest.mark.slow
def test_the_newest_unfinished_run_is_resumed_or_the_one_named(stopped, capsys):
    output = Path(stopped().path_model_save)
    stop_at(stopped(run_name="b"), 3)
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


def test_of_unfinished_runs_the_one_that_trained_last_is_found(settings):
    output = Path(settings().path_model_save)
    for seconds, name in ((1000, "older"), (2000, "newer")):
        (output / name).mkdir(parents=True)
        for file, content in (("settings.json", '{"settings": {}}'), ("metrics.csv", "step\n")):
            (output / name / file).write_text(content)
            os.utime(output / name / file, (seconds, seconds))
    (output / "older" / "report.html").write_text("drawn anew")  # this touches the folder last
    for name, content in (("list", "[]"), ("text", "no JSON"), ("other", '{"lr": 1}'), ("null", '{"settings": null}')):
        (output / name).mkdir()
        (output / name / "settings.json").write_text(content)  # another program's
    assert find_run(settings(resume=True)) == output / "newer"
    for path in (output / "newer", output / "older"):
        shutil.rmtree(path)
    with pytest.raises(UserError, match="holds no unfinished run"):
        find_run(settings(resume=True))


def test_a_run_at_work_is_not_resumed_by_another_process(stopped):
    folder = Path(stopped().path_model_save)
    with lock(folder / ".cache" / "a.lock"), pytest.raises(UserError, match="another process is at work"):
        train.main(stopped(resume=True))


@pytest.fixture(scope="module")
def after_one_step(module_settings, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("output"))
    return run(module_settings(run_name="start", max_steps=1, path_model_save=output)) / "final"


@pytest.fixture
def start(after_one_step, tmp_path):
    """The folder of a model to start from, which a test may damage."""
    return shutil.copytree(after_one_step, tmp_path / "start")


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (
            lambda key: f"module.{key}",
            r"lacks \d+ of .*, such as bert\.\S+\. It has others, such as module\..* save those of model\.module",
        ),
        (
            lambda key: key.replace("attention.self.query", "attention.self.Wq"),
            r"lacks 4 .*query.*such as .*Wq",
        ),
        (lambda key: key.replace("layer.0", "layer.7"), r"lacks 16 .*layer\.0"),
        (lambda key: None if "word_embeddings" in key or "decoder" in key else key, r"lacks .*word_embeddings"),
    ],
    ids=["module", "Wq", "layer", "embeddings"],
)
def test_an_encoder_whose_weights_are_not_all_in_the_file_is_refused(settings, start, rename, said):
    """It would be trained from random weights without a word."""
    kept = {rename(key): tensor for key, tensor in load_file(start / "model.safetensors").items() if rename(key)}
    save_file(kept, start / "model.safetensors", metadata={"format": "pt"})
    config = settings(initial_pretrain_model=str(start), initial_pretrain_tokenizer=str(start))
    with pytest.raises(UserError, match=f"initial_pretrain_model: .*{said}"):
        train.main(config)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", ["evaluate_only", "dry_run", "check_only"])
def test_weights_that_are_not_finite_are_refused(settings, start, value, mode):
    weights = load_file(start / "model.safetensors")
    weights["bert.encoder.layer.0.output.dense.weight"][1, 2] = value
    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
    names = {"initial_pretrain_model": str(start), "initial_pretrain_tokenizer": str(start)}
    with pytest.raises(UserError, match=r"not finite, in bert\.encoder\.layer\.0\.output\.dense\.weight"):
        train.main(settings(**names, **{mode: True}))
