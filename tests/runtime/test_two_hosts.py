"""Several machines: two network namespaces of this one, joined by a cable that can be cut, over one file system."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from runs import ROOT, assert_close, checkpoints, finish, folder_of, read_until, run, settings_in, start
from texts import write_text

pytestmark = pytest.mark.slow

ANSWERS = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: MULTI_CPU
machine_rank: {rank}
main_process_ip: 10.77.0.1
main_process_port: 29577
main_training_function: main
mixed_precision: 'no'
num_machines: 2
num_processes: 2
rdzv_backend: static
same_network: true
use_cpu: true
"""

# train.py, whose steps take their time, with hearts that give up within seconds; one rank may hang in its tenth step.
HASTY = f"""\
import os, runpy, sys, time
from datetime import timedelta
sys.path.insert(0, {str(ROOT)!r})
from accelerate import Accelerator
from mlm.runtime import heartbeat
heartbeat.BEAT_S, heartbeat.HUNG_AFTER_S, heartbeat.SECONDS_TO_SPEAK = 0.5, 8.0, 1.0
heartbeat.CUT_OFF_AFTER = timedelta(seconds=8)
clip, taken = Accelerator.clip_grad_norm_, []
def slowly(*arguments):
    taken.append(1)
    time.sleep(10**6 if len(taken) == 10 and os.environ["RANK"] == os.environ.get("HANGS") else 0.2)
    return clip(*arguments)
Accelerator.clip_grad_norm_ = slowly
runpy.run_path("train.py", run_name="__main__")
"""
SECONDS_TO_END = 40  # with such hearts, and launchers that wait for their processes


class Host(NamedTuple):
    rank: int
    name: str  # of its network namespace
    cable: str  # its end of it


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts():
    """Two of them, at 10.77.0.1 and 10.77.0.2."""
    if not shutil.which("ip"):
        pytest.skip("there is no ip, of iproute2, to make network namespaces with")
    pair = [Host(rank, f"host{rank}-{os.getpid()}", f"cable{rank}-{os.getpid() % 10**6}") for rank in range(2)]
    try:
        for host in pair:
            ip("netns", "add", host.name)
            ip("-n", host.name, "link", "set", "lo", "up")
        ends = [("netns", host.name) for host in pair]
        ip("link", "add", pair[0].cable, *ends[0], "type", "veth", "peer", "name", pair[1].cable, *ends[1])
        for host in pair:
            ip("-n", host.name, "address", "add", f"10.77.0.{host.rank + 1}/24", "dev", host.cable)
        join(pair)
        yield pair
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces are not allowed here: {getattr(error, 'stderr', '') or error}")
    finally:
        for host in pair:
            kill(host)
            subprocess.run(["ip", "netns", "delete", host.name], stderr=subprocess.DEVNULL)


def join(hosts: list[Host]) -> None:
    for host in hosts:
        ip("-n", host.name, "link", "set", host.cable, "up")


def cut(hosts: list[Host]) -> None:
    for host in hosts:
        ip("-n", host.name, "link", "set", host.cable, "down")


def kill(host: Host) -> None:
    """All processes of it, at once."""
    listed = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True).stdout
    for process in listed.split():
        os.kill(int(process), signal.SIGKILL)


def start_on(host: Host, command: list[str], config, **environment: str) -> subprocess.Popen:
    inside = ["ip", "netns", "exec", host.name, *command]
    return start(config, inside, GLOO_SOCKET_IFNAME=host.cable, **environment)


def torchrun(hosts: list[Host], config, script: Path = ROOT / "train.py", **environment: str) -> list[subprocess.Popen]:
    """The launcher of each host, with one rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    command += ["--master_addr=10.77.0.1", "--master_port=29577"]
    return [
        start_on(host, [*command, f"--node_rank={host.rank}", str(script)], config, **environment) for host in hosts
    ]


def run_sh(hosts: list[Host], configs: list, folder: Path) -> list[subprocess.Popen]:
    """./run.sh on each host, after `accelerate config` was answered there."""
    started = []
    for host, config in zip(hosts, configs, strict=True):
        home = folder / host.name / "accelerate"
        home.mkdir(parents=True)
        (home / "default_config.yaml").write_text(ANSWERS.format(rank=host.rank))
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        started.append(start_on(host, ["./run.sh"], config, HF_HOME=str(home.parent), PATH=path))
    return started


def settings_of(folder: Path, **changes):
    usual = {"max_steps": 20, "hidden_dropout": 0.0, "log_every": 1, "save_every": 5, "keep_checkpoints": 9}
    return settings_in(folder, **usual | changes)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of the same run in one process."""
    folder = tmp_path_factory.mktemp("one")
    write_text(folder / "text")
    return run(settings_of(folder, run_name="one"))


@pytest.fixture
def settings(tmp_path, text_folder):
    return partial(settings_of, tmp_path)


def assert_trained_as_one(config, one: Path, devices: str = "2 x cpu") -> None:
    assert f'"devices": "{devices}"' in (folder_of(config) / "settings.json").read_text()
    assert_close(folder_of(config), one)


def test_two_hosts_train_as_one_by_torchrun(hosts, settings, one):
    config = settings(run_name="mine")
    for process in torchrun(hosts, config):
        finish(process)
    assert_trained_as_one(config, one)


def test_two_hosts_train_as_one_by_run_sh(hosts, settings, one, tmp_path):
    config = settings(run_name="mine")
    for process in run_sh(hosts, [config, config], tmp_path):
        finish(process)
    assert_trained_as_one(config, one)


def test_a_folder_that_the_hosts_do_not_share_is_refused(hosts, settings, tmp_path):
    configs = [settings(run_name="mine", path_model_save=str(tmp_path / "output" / host.name)) for host in hosts]
    for process, config in zip(run_sh(hosts, configs, tmp_path), configs, strict=True):
        _, err = finish(process, 2)
        output = config.path_model_save
        assert [line for line in err.splitlines() if line.startswith("error: ")] == [
            f"error: path_model_save: {output} is not the same folder on all machines; put it on a disk that all of "
            "them see, as each resumes from what the first one saves"
        ]
        assert not [path for path in Path(output).iterdir() if path.name != ".cache"]


@pytest.mark.parametrize("fault", ["a cut cable", "the first host is gone", "the second host is gone", "a rank hangs"])
def test_a_lost_rank_ends_the_run_everywhere_and_it_can_be_resumed(hosts, settings, one, tmp_path, fault):
    config, script = settings(run_name="mine"), tmp_path / "hasty.py"
    script.write_text(HASTY)
    processes = torchrun(hosts, config, script, **({"HANGS": "1"} if fault == "a rank hangs" else {}))
    read_until(processes[0], "step 8/")
    if fault != "a rank hangs":
        cut(hosts)
    gone = {"the first host is gone": 0, "the second host is gone": 1}.get(fault)
    if gone is not None:
        kill(hosts[gone])
    began = time.monotonic()
    for rank, process in enumerate(processes):
        out, err = process.communicate(timeout=120)
        if rank == gone:
            continue
        assert process.returncode == 1 and time.monotonic() - began < SECONDS_TO_END, f"{out}\n{err}"
        [line] = [line for line in err.splitlines() if line.startswith("error: ")]
        assert f"error: rank {rank} lost touch with another rank" in line and "with --resume continues" in line
    assert checkpoints(folder_of(config)) == [5] and not (folder_of(config) / "final").exists()

    join(hosts)
    shutil.copytree(folder_of(config), folder_of(config).with_name("alone"))
    for process in torchrun(hosts, settings(run_name="mine", resume=True)):
        finish(process)
    assert_trained_as_one(config, one)
    alone = settings(run_name="alone", resume=True)
    run(alone)
    assert_trained_as_one(alone, one, "1 x cpu")
