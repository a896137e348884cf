"""Flags of downstream.py become settings; wrong ones, and models that do not fit, are named plainly."""

import json
import shutil
import subprocess
import sys

import pytest
from comparisons import make_rows, save_model, write_rows
from runs import ROOT, finish, fork_program
from safetensors.torch import load_file, save_file

from Config import DownstreamConfig, parse_downstream_flags
from mlm.errors import UserError


def test_flags_become_settings():
    config = parse_downstream_flags(
        ["--task", "t", "--models", "a", "b", "--examples_per_class", "10", "all", "--frozen"]
    )
    assert config == DownstreamConfig("t", ("a", "b"), examples_per_class=("10", "all"), frozen=True)


def test_flags_of_former_versions_still_work():
    required = ["--task", "t", "--models", "a"]
    expected = DownstreamConfig("t", ("a",), num_seeds=8, min_steps=50)
    for flags in ("--num_seeds 8 --min_steps 50", "--seeds 8 --least_steps 50", "--seeds=8 --least-steps=50"):
        assert parse_downstream_flags([*required, *flags.split()]) == expected


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--task"),
        (["--task", "nowhere.tsv", "--models", "./nowhere"], "error: models: there is no folder ./nowhere"),
        (["--task", "a", "--models", "b", "--num_seeds", "0"], "error: num_seeds: must be greater than or equal to 1"),
        (["--task", "a", "--models", "b", "--seeds", "0"], "error: num_seeds: must be greater than or equal to 1"),
        (
            ["--task", "a", "--models", "b", "--least_steps", "-1"],
            "error: min_steps: must be greater than or equal to 1",
        ),
        (["--task", "a", "--models", "b", "b"], "error: models: each is to be named once"),
        (["--task", "a", "--models", "b", "--examples_per_class", "some"], "error: examples_per_class: "),
        (["--task", "a", "--models", "b", "--learning_rates", "0"], "error: learning_rates: "),
        (["--task", "a", "--models", "b", "--test_fraction", "0.95"], "error: test_fraction, dev_fraction: "),
    ],
)
def test_wrong_flags_end_with_status_2_and_no_traceback(flags, said):
    command = [sys.executable, "downstream.py", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert said in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_a_task_that_is_not_there_ends_with_status_2_and_no_traceback():
    said, _ = finish(fork_program("downstream.py", "--task", "nowhere.tsv", "--models", "tests"), 2)
    assert said.startswith("error: task: there is no file or folder nowhere.tsv") and said.count("\n") == 1


def test_models_that_do_not_fit_are_named(tmp_path, compare):
    task = write_rows(tmp_path / "task.tsv", make_rows(60, 4))
    model = save_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"sen_max_length, models: .*128 positions"):
        compare(task, model, sen_max_length=129)
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "model" / file, tmp_path / "gpt")
    with pytest.raises(UserError, match=r"models: .*gpt is no encoder that can be trained here, but of type gpt2"):
        compare(task, str(tmp_path / "gpt"))

    weights = load_file(tmp_path / "model" / "model.safetensors")
    renamed = {f"module.{name}": weight for name, weight in weights.items()}
    save_file(renamed, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"models: .* lacks 21 of BERT's weights, such as embeddings"):
        compare(task, model)
    infinite = {name: weight / 0 for name, weight in weights.items()}
    save_file(infinite, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="has weights that are not finite"):
        compare(task, model)
    with pytest.raises(UserError, match="general_text: nowhere is no file or folder"):
        compare(task, model, general_text="nowhere")
