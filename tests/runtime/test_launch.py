"""Laws 5 and 8 as a user meets them, from `python train.py` and ./run.sh: signals, dead ranks and mistakes."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import pytest
from accelerate import Accelerator
from runs import (
    draw_no_charts,
    finish,
    flags_of,
    folder_of,
    fork_program,
    fork_ranks,
    metrics,
    newest_whole,
    read_until,
    start,
    stop_at,
)
from torch.distributed import DistNetworkError

from mlm.errors import UserError
from mlm.runtime import launch

TWO_RANKS = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: MULTI_GPU
gpu_ids: all
machine_rank: 0
main_training_function: main
mixed_precision: {precision}
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
use_cpu: true
"""
ONE_RANK = TWO_RANKS.replace("MULTI_GPU", "'NO'").replace("num_processes: 2", "num_processes: 1")


pytestmark = pytest.mark.slow


@pytest.fixture
def endless(settings):
    """Makes the settings of a run that no test waits for."""
    return partial(settings, num_epochs=1000, log_every=1, save_every=5)


@pytest.fixture
def answered(tmp_path):
    """The environment after `accelerate config` was answered."""

    def make(answers: str, precision: str = "'no'") -> dict[str, str]:
        home = Path(mkdtemp(dir=tmp_path))
        (home / "accelerate").mkdir()
        (home / "accelerate" / "default_config.yaml").write_text(answers.format(precision=precision))
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {"HF_HOME": str(home), "PATH": path}

    return make


def assert_stopped(config, process, kind: int) -> None:
    """After step 7 it is sent a signal, saves the step that it is in, and says how to go on."""
    read_until(process, "step 7/")
    process.send_signal(kind)
    out, err = finish(process, 128 + kind)
    newest, damaged = newest_whole(folder_of(config))
    assert newest and not damaged
    assert f"stopped after step {int(newest.name[5:])}, saved in {newest}. " in out and "with --resume" in out
    assert "Traceback" not in out + err


def test_a_signal_leaves_a_whole_checkpoint_and_says_how_to_go_on(endless):
    """SIGTERM to one run and Ctrl-C to another, at the same time."""
    terminated, interrupted = endless(run_name="terminated"), endless(run_name="interrupted")
    first, second = (
        fork_program("train.py", *flags_of(config), before=draw_no_charts) for config in (terminated, interrupted)
    )
    assert_stopped(terminated, first, signal.SIGTERM)
    assert_stopped(interrupted, second, signal.SIGINT)


def test_run_sh_trains_as_accelerate_was_configured_and_hands_signals_on(endless, answered):
    """On the two ranks of a multi-CPU machine, in the precision that was chosen, until a SIGTERM; and on one rank,
    until Ctrl-C. The check before is made in that precision too."""
    on_two_cpus = answered(TWO_RANKS.replace("MULTI_GPU", "MULTI_CPU"), "bf16")
    two = endless(run_name="two", hidden_dropout=0.0, mixed_precision="auto")
    one = endless(run_name="one", hidden_dropout=0.0, mixed_precision="auto")
    by_two, by_one = start(two, ["./run.sh"], **on_two_cpus), start(one, ["./run.sh"], **answered(ONE_RANK, "bf16"))
    assert_stopped(one, by_one, signal.SIGINT)
    assert_stopped(two, by_two, signal.SIGTERM)
    here = stop_at(endless(run_name="here", hidden_dropout=0.0, mixed_precision="bf16"), 7)
    losses = []
    for folder, devices in ((here, 1), (folder_of(one), 1), (folder_of(two), 2)):
        written = (folder / "settings.json").read_text()
        assert f'"devices": "{devices} x cpu"' in written and '"mixed_precision": "bf16"' in written
        losses.append([float(row["train_loss"]) for row in metrics(folder)[1:8]])
        assert losses[-1] == pytest.approx(losses[0], rel=0.01) and len(losses[-1]) == 7


def clip_without_end():
    Accelerator.clip_grad_norm_ = lambda *arguments: time.sleep(100)


def test_a_second_ctrl_c_exits_at_once(settings):
    """In a step that does not end."""
    process = fork_program("train.py", *flags_of(settings()), before=clip_without_end)
    read_until(process, "before training")
    process.send_signal(signal.SIGINT)
    read_until(process, "finishing the step")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT


def test_a_dead_rank_stops_the_other_with_plain_words(endless, answered):
    config = endless(run_name="mine")
    process = start(config, ["./run.sh"], **answered(TWO_RANKS))
    read_until(process, "step 7/")
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(ranks) == 2
    os.kill(ranks[0], signal.SIGKILL)
    _, err = finish(process, 1)
    assert "Traceback" not in err
    assert "error: rank 1 lost touch with another rank" in err and "--resume continues" in err
    assert "error: rank 0 ended with status -9; the others were stopped" in err
    newest, damaged = newest_whole(folder_of(config))
    assert newest and not damaged


def test_run_sh_says_a_mistake_once(settings, answered):
    """One that only shows in the precision that the ranks would have."""
    process = start(settings(mixed_precision="auto"), ["./run.sh"], **answered(TWO_RANKS, "fp16"))
    _, err = finish(process, 2)
    assert err.count("\n") == 1 and err.startswith("error: mixed_precision: fp16, which the launcher chose")


def test_run_sh_refuses_what_bert_does_not_need(settings, answered):
    answers = TWO_RANKS.replace("MULTI_GPU", "FSDP")
    process = start(settings(), ["./run.sh"], **answered(answers))
    _, err = finish(process, 2)
    assert err.startswith("error: accelerate config: DeepSpeed, FullyShardedDataParallel")


@pytest.mark.parametrize(
    "answers",
    [
        b"",
        b"\xff\xfe",
        b"- a\n- b\n",
        b"compute_environment: [LOCAL\n",
        b"compute_environment: AMAZON_SAGEMAKER\n",
        TWO_RANKS.replace("MULTI_GPU", "OF_TOMORROW").format(precision="'no'").encode(),
        TWO_RANKS.replace("num_processes: 2", "num_processes: two").format(precision="'no'").encode(),
        TWO_RANKS.replace("num_machines: 1", "num_machines: 0").format(precision="'no'").encode(),
        TWO_RANKS.replace("num_machines: 1", "num_machines: 2").format(precision="'no'").encode(),  # and no address
        TWO_RANKS.format(precision="int3").encode(),
        TWO_RANKS.format(precision="'no'").encode() + b"a_key_of_tomorrow: 1\n",
    ],
)
def test_a_configuration_file_that_cannot_be_used_is_said_plainly(tmp_path, monkeypatch, answers):
    file = tmp_path / "default_config.yaml"
    line = refusal_of(file, answers, monkeypatch)
    assert line.startswith(f"accelerate config: {file} cannot be used: ") and line.endswith("config` again")


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_that_machines_cannot_share_evenly_are_refused(tmp_path, monkeypatch, processes):
    """With one for two machines, each would train alone."""
    answers = TWO_RANKS.replace("num_machines: 1", "num_machines: 2").replace(
        "num_processes: 2", f"num_processes: {processes}"
    )
    line = refusal_of(tmp_path / "default_config.yaml", answers.format(precision="'no'").encode(), monkeypatch)
    assert line.startswith(f"accelerate config: {processes} process(es) are not the same number on each of 2 machines")


def test_a_first_machine_that_does_not_answer_is_said_plainly(tmp_path, monkeypatch):
    def wait_in_vain(arguments):
        raise DistNetworkError("timed out\nframe #0")

    monkeypatch.setattr("accelerate.commands.launch.multi_gpu_launcher", wait_in_vain)
    monkeypatch.setattr(launch.subprocess, "run", lambda *command, **how: subprocess.CompletedProcess(command, 0))
    monkeypatch.setattr(launch.logging, "disable", lambda: None)
    of_the_second = "machine_rank: 1\nmain_process_ip: 10.0.0.1\nmain_process_port: 29500\n"
    answers = TWO_RANKS.replace("num_machines: 1", "num_machines: 2").replace("machine_rank: 0\n", of_the_second)
    line = refusal_of(tmp_path / "default_config.yaml", answers.format(precision="'no'").encode(), monkeypatch)
    assert line == "accelerate config: the first machine, 10.0.0.1:29500, does not answer: timed out"


def refusal_of(file: Path, answers: bytes, patches: pytest.MonkeyPatch) -> str:
    """The one line that run.sh ends with where `accelerate config` was answered so."""
    file.write_bytes(answers)
    for module in ("launch", "config.config_args"):
        patches.setattr(f"accelerate.commands.{module}.default_config_file", str(file))
    patches.setattr(sys, "argv", ["launch", "--demo", "--check_only"])
    with pytest.raises(UserError) as refused:
        launch.main()
    [line] = str(refused.value).splitlines()
    return line


def test_processes_without_a_device_of_their_own_are_refused(settings, answered):
    on_gpus = {"ACCELERATE_USE_CPU": "false"}
    environment = answered(TWO_RANKS.replace("true", "false")) | on_gpus
    by_run_sh = start(settings(run_name="a"), ["./run.sh"], **environment)
    ranks = fork_ranks(settings(run_name="b"), 2, **on_gpus)
    _, err = finish(by_run_sh, 2)
    assert err.startswith("error: accelerate config: asks for 2 GPU(s), of which 0 can be used here")
    said = [rank.communicate()[0] for rank in ranks]  # of which one may be gone before the other has met it
    assert any("error: the launcher started several processes, and there is no GPU for them" in out for out in said)
    assert all(rank.returncode for rank in ranks)
