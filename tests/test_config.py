"""Law 8: a wrong setting is said plainly, with its name, before anything heavy is imported."""

import ast
import re
import shlex
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from runs import finish, fork_program

from Config import Config, DownstreamConfig, defaults_of, parse_flags
from mlm.errors import UserError
from mlm.settings import repeat_command

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 0}, ["batch_size"]),
        ({"batch_size": "32"}, ["batch_size"]),
        ({"batch_size": 1.5}, ["batch_size"]),
        ({"num_epochs": True}, ["num_epochs"]),
        ({"num_epochs": None}, ["num_epochs"]),
        ({"max_steps": -1, "num_warmup_steps": 0}, ["max_steps"]),
        ({"learning_rate": 0.0}, ["learning_rate"]),
        ({"learning_rate": float("nan")}, ["learning_rate"]),
        ({"learning_rate": float("inf")}, ["learning_rate"]),
        ({"learning_rate": 10**400}, ["learning_rate"]),
        ({"add_words": "auto:0"}, ["add_words"]),
        ({"add_words": "auto:all"}, ["add_words"]),
        ({"user_words": " "}, ["user_words"]),
        ({"mask_span": True, "mlm_probability": 0.6}, ["mask_span", "mlm_probability"]),
        ({"mask_span": True, "mlm_probability_end": 0.6}, ["mask_span", "mlm_probability_end"]),
        ({"mlm_probability_end": 0.0}, ["mlm_probability_end"]),
        ({"replay_fraction": 0.1}, ["replay_fraction", "path_general"]),
        ({"replay_fraction": 1.0, "path_general": "general"}, ["replay_fraction"]),
        ({"replay_fraction": -0.1, "path_general": "general"}, ["replay_fraction"]),
        ({"replay_fraction": 0.015, "path_general": "general"}, ["replay_fraction", "batch_size"]),  # of 32: none
        ({"replay_fraction": 0.985, "path_general": "general"}, ["replay_fraction", "batch_size"]),  # all
        ({"num_warmup_steps": -1}, ["num_warmup_steps"]),
        ({"num_warmup_steps": 2.5}, ["num_warmup_steps"]),
        ({"num_warmup_steps": 20, "max_steps": 10}, ["num_warmup_steps", "max_steps"]),
        ({"schedule": "cosine"}, ["schedule"]),
        ({"early_stop_evals": 0, "schedule": "constant"}, ["early_stop_evals"]),
        ({"early_stop_evals": 3}, ["early_stop_evals", "schedule"]),
        ({"mlm_probability_end": 0.1, "schedule": "constant"}, ["mlm_probability_end", "schedule"]),
        ({"weight_decay": float("nan")}, ["weight_decay"]),
        ({"max_grad_norm": 0}, ["max_grad_norm"]),
        ({"hidden_dropout": 1.0}, ["hidden_dropout"]),
        ({"attention_dropout": None}, ["attention_dropout"]),
        ({"mlm_probability": 0}, ["mlm_probability"]),
        ({"mlm_probability": 1.1}, ["mlm_probability"]),
        ({"mask_replace_prob": 0.9, "random_replace_prob": 0.2}, ["mask_replace_prob", "random_replace_prob"]),
        ({"mask_replace_prob": float("nan")}, ["mask_replace_prob", "random_replace_prob"]),
        ({"test_fraction": 0.0}, ["test_fraction"]),
        ({"test_fraction": 1.0}, ["test_fraction"]),
        ({"sen_max_length": 2}, ["sen_max_length"]),
        ({"vocab_size": 5}, ["vocab_size"]),
        ({"seed": -1}, ["seed"]),
        ({"seed": 2**63}, ["seed"]),
        ({"log_every": 0, "eval_every": 0}, ["log_every", "eval_every"]),  # all that is wrong, at once
        ({"mixed_precision": "fp8"}, ["mixed_precision"]),
        ({"initial_pretrain_model": "scratch:huge"}, ["initial_pretrain_model"]),
        ({"initial_pretrain_model": " "}, ["initial_pretrain_model"]),
        ({"initial_pretrain_tokenizer": "corpus"}, ["initial_pretrain_tokenizer", "initial_pretrain_model"]),
        ({"initial_pretrain_tokenizer": "scratch:mini"}, ["initial_pretrain_tokenizer"]),
        ({"path_datasets": ""}, ["path_datasets"]),
        ({"path_model_save": "a\0b"}, ["path_model_save"]),
        ({"cuda_visible_devices": "0,,1"}, ["cuda_visible_devices"]),
        ({"run_name": "a/b"}, ["run_name"]),
        ({"run_name": ".."}, ["run_name"]),
        ({"run_name": ".cache"}, ["run_name"]),
        ({"run_name": ""}, ["run_name"]),
        ({"tracker": ""}, ["tracker"]),
    ],
)
def test_wrong_settings_are_named(changes, named):
    with pytest.raises(UserError) as error:
        Config(**changes)
    for name in named:
        assert re.search(rf"\b{name}\b", str(error.value))
    accused = {name for line in str(error.value).splitlines() for name in line.partition(":")[0].split(", ")}
    assert accused <= set(named)


@pytest.mark.parametrize(("program", "settings"), [("train.py", Config), ("downstream.py", DownstreamConfig)])
def test_every_field_is_a_flag_with_its_comment_as_help(program, settings):
    help_text = run("--help", program=program).stdout
    for field in fields(settings):
        assert f"--{field.name}" in help_text
    for comment in comments(settings).values():
        assert comment.split(";")[0].split("(")[0].split()[0] in help_text


def test_flags_change_settings_and_leave_the_rest():
    config = parse_flags(["--num_epochs", "5", "--run_name", "mine", "--whole_words_mask"])
    assert config == Config(num_epochs=5, run_name="mine", whole_words_mask=True)


def test_a_flag_beside_demo_wins():
    assert parse_flags(["--demo", "--num_epochs", "1"]).num_epochs == 1
    assert parse_flags(["--demo"]).initial_pretrain_tokenizer == "corpus"


def run(*flags, program="train.py"):
    return subprocess.run([sys.executable, program, *flags], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch_size", "0"], "error: batch_size: must be greater than or equal to 1, not 0"),
        (["--batch_size", "many"], "--batch_size"),
        (["--batchsize", "3"], "--batchsize"),
        (["--initial_pretrain_model", "./nowhere"], "error: initial_pretrain_model: there is no folder ./nowhere"),
        (["--mixed_precision", "int8"], "--mixed_precision"),
    ],
)
def test_wrong_flags_end_with_status_2_and_no_traceback(flags, said):
    result = run(*flags)
    assert result.returncode == 2
    assert said in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_text_that_is_not_there_ends_with_status_2_and_no_traceback():
    flags = ["--initial_pretrain_model", "scratch:tiny", "--initial_pretrain_tokenizer", "corpus"]
    said, _ = finish(fork_program("train.py", *flags, "--path_datasets", "tests"), 2)
    assert said.startswith("error: path_datasets: no train*.txt in tests") and said.count("\n") == 1


@pytest.mark.parametrize("program", ["train.py", "downstream.py"])
def test_flags_are_answered_before_torch_is_imported(program):
    source = (
        f"import sys; sys.argv += ['--help']\ntry: import runpy; runpy.run_path('{program}', run_name='__main__')\n"
    )
    source += "except SystemExit: pass\nassert not {'torch', 'transformers', 'datasets'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True).returncode == 0


def comments(settings: type) -> dict[str, str]:
    """Each field's comment, read from the source."""
    lines = (ROOT / "Config.py").read_text(encoding="utf-8").splitlines()
    [config] = [node for node in ast.parse("\n".join(lines)).body if getattr(node, "name", "") == settings.__name__]
    named = [node for node in config.body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: lines[node.lineno - 1].split("  # ")[1] for node in named}


def settings_table(settings: type) -> str:
    """The table of settings in docs/. After a change of Config.py: PYTHONPATH=.:tests python tests/test_config.py"""
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for field in fields(settings):
        default = "unset" if field.default is None else f"`{field.default!r}`".replace("'", '"')
        default = "required" if field.default is MISSING else default
        meaning = comments(settings)[field.name].replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
        rows.append(f"| `{field.name}` | {default} | {meaning} |")
    return "\n".join(rows)


SETTINGS_PAGE = ROOT / "docs" / "settings.md"
TABLE = re.compile(r"\| setting \|.*?(?=\n\n|\n?\Z)", re.DOTALL)


@pytest.mark.parametrize("settings", [Config, DownstreamConfig])
def test_the_page_of_settings_has_their_table(settings):
    assert settings_table(settings) in SETTINGS_PAGE.read_text(encoding="utf-8")


def test_the_chinese_page_of_settings_has_the_same_names_and_defaults():
    rows = re.compile(r"^\| (`\w+`) \| (.+?) \| (\S.*) \|$", re.MULTILINE)
    english = rows.findall(SETTINGS_PAGE.read_text(encoding="utf-8"))
    chinese = rows.findall((ROOT / "docs" / "zh-CN" / "settings.md").read_text(encoding="utf-8"))
    words = {"unset": "未设", "required": "必填"}
    expected = [(name, words.get(default, default)) for name, default, _ in english]
    assert [(name, default) for name, default, _ in chinese] == expected
    assert all(re.search("[\u4e00-\u9fff]", meaning) for _, _, meaning in chinese)


if __name__ == "__main__":
    tables = iter([settings_table(Config), settings_table(DownstreamConfig)])
    page = TABLE.sub(lambda _: next(tables), SETTINGS_PAGE.read_text(encoding="utf-8"))
    SETTINGS_PAGE.write_text(page, encoding="utf-8")


@pytest.mark.parametrize(
    "flags", [[], ["--num_epochs", "3"], ["--hidden_dropout", "0.2", "--initial_pretrain_model", "scratch:mini"]]
)
@pytest.mark.parametrize("mode", [[], ["--demo"]])
def test_the_command_that_repeats_a_run_means_the_same_settings(mode, flags):
    """Also with --demo, beside which other defaults hold."""
    given = parse_flags([*mode, *flags])
    command = shlex.split(repeat_command("train.py", given, defaults_of(given), without=()))
    assert command[:2] == ["python", "train.py"] and parse_flags(command[2:]) == given


@pytest.mark.parametrize(
    ("given", "meant"), [("~/corpus", "/home/me/corpus"), ("a/~/b", "a/~/b"), ("~me", "~me"), ("~", "~")]
)
def test_a_path_in_the_users_home_is_expanded(monkeypatch, given, meant):
    """Behind an equals sign, and in Config.py, no shell does it."""
    monkeypatch.setenv("HOME", "/home/me")
    names = ("path_datasets", "path_model_save", "initial_pretrain_model", "initial_pretrain_tokenizer", "user_words")
    config = parse_flags([f"--{name}={given}" for name in (*names, "add_words")])
    assert {getattr(config, name) for name in (*names, "add_words")} == {meant}
    compared = DownstreamConfig(task=given, models=(given, "b"), general_text=given, path_model_save=given)
    assert (compared.task, compared.general_text, compared.path_model_save, *compared.models) == (meant,) * 4 + ("b",)
