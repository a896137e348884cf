"""Law 5: a checkpoint is whole or absent. What one holds, which ones stay, and what damage does not harm."""

import json
import shutil

import pytest
from runs import assert_same_bits, checkpoint, checkpoints, folder_of, newest_whole, run, stop_at
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

import train
from mlm.errors import UserError
from mlm.training import checkpoint as training_checkpoint


def test_a_checkpoint_is_a_plain_folder_with_a_manifest(long_settings):
    folder = stop_at(long_settings(run_name="a", keep_checkpoints=3, max_steps=30), 23)
    assert checkpoints(folder) == [15, 20, 23]
    newest = checkpoint(folder, 23)
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
    kinds = {name: {key.rpartition("/")[2] for key in moments if key.startswith(f"{name}/")} for name in trained}
    assert kinds["bert.embeddings.word_embeddings.weight"] == {"step", "exp_avg", "exp_avg_sq"}
    assert kinds["bert.encoder.layer.1.output.dense.weight"] == {"momentum"}


def test_a_checkpoint_is_not_written_again_where_nothing_was_trained(long_settings):
    path = checkpoint(stop_at(long_settings(run_name="a"), 8), 8)
    written = path.stat().st_ino, (path / "state.json").stat().st_mtime_ns
    stop_at(long_settings(resume=True), 8, evaluation_batch=1)  # the evaluation that was due after step 8
    assert written == (path.stat().st_ino, (path / "state.json").stat().st_mtime_ns)


@pytest.fixture(scope="module")
def stopped_after_11(module_settings):
    return stop_at(module_settings(run_name="a"), 11)


@pytest.fixture
def two_checkpoints(stopped_after_11, long_settings):
    """The folder of a run that was stopped after step 11, and saved after step 10 as well."""
    folder = folder_of(long_settings(run_name="a"))
    shutil.copytree(stopped_after_11.parent, folder.parent)
    assert checkpoints(folder) == [10, 11]
    return folder


def damage(path, how: str) -> None:
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
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(long_settings, whole, two_checkpoints, capsys, how):
    damage(checkpoint(two_checkpoints, 11), how)
    run(long_settings(run_name="a", resume=True))
    output = capsys.readouterr().out
    assert f"warning: {checkpoint(two_checkpoints, 11)} is skipped" in output
    assert f"resumed from {checkpoint(two_checkpoints, 10)}" in output
    assert_same_bits(two_checkpoints, whole)


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew(long_settings, two_checkpoints):
    for path in (two_checkpoints / "checkpoints").iterdir():
        damage(path, "cut")
    with pytest.raises(UserError, match=r"(?s)no checkpoint of .* is whole.*step-00000011.*step-00000010"):
        train.main(long_settings(run_name="a", resume=True))
    assert checkpoints(two_checkpoints) == [10, 11]


def test_a_damaged_checkpoint_does_not_outlive_a_whole_one(long_settings):
    folder = stop_at(long_settings(run_name="a"), 20)
    damage(checkpoint(folder, 20), "cut")
    shutil.copytree(checkpoint(folder, 15), folder / "checkpoints" / "step-mine")  # a user's copy
    stop_at(long_settings(resume=True, save_every=1, keep_checkpoints=1), 17)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-00000017", "step-00000020", "step-mine"}
    assert newest_whole(folder)[0].name == "step-00000017"


def test_a_save_that_fails_leaves_the_checkpoint_before(long_settings, monkeypatch):
    saves = []

    def failing(tensors, path):
        saves.append(path)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")
        return save_file(tensors, path)

    save_file = training_checkpoint.save_file
    monkeypatch.setattr(training_checkpoint, "save_file", failing)
    with pytest.raises(UserError, match=r"cannot write .*step-00000010: No space left on device"):
        train.main(long_settings(run_name="a"))
    folder = folder_of(long_settings(run_name="a"))
    assert checkpoints(folder) == [5]
    assert newest_whole(folder)[0].name == "step-00000005"
