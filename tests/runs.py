"""Runs of the whole job for tests: in this process, or started as a user would, and what they leave."""

import csv
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file

import train

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LAUNCHERS = {1: [sys.executable]} | {ranks: [*TORCHRUN, f"--nproc_per_node={ranks}"] for ranks in (2, 3)}


def run(config) -> Path:
    """Trains in this process and returns the run's folder."""
    train.main(config)
    return newest_run(config)


def newest_run(config) -> Path:
    folders = [path for path in Path(config.path_model_save).iterdir() if not path.name.startswith(".")]
    return max(folders, key=lambda path: path.stat().st_mtime)


def start(config, command=(sys.executable, "train.py"), **environment) -> subprocess.Popen:
    """Starts a command with the flags of `config`, one thread a process; its output is a pipe."""
    given = {name: value for name, value in asdict(config).items() if value is not None and value is not False}
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | environment
    return subprocess.Popen(
        [*command, *flags], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    """Waits for the end, which must have the status; what was written to stdout and stderr, as far as not yet read."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out, err


def read_until(process: subprocess.Popen, *words: str) -> None:
    """Reads the output up to the first line that holds any of the words."""
    for line in process.stdout:
        if any(each in line for each in words):
            return
    raise AssertionError(f"ended without {words}: {process.stderr.read()}")


def metrics(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def untimed(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without its column of speeds."""
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in metrics(folder)]


def weights(folder: Path, name: str = "final") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "model.safetensors")


def assert_same_bits(folder: Path, other: Path) -> None:
    """Final and best weights, and metrics.csv but for its speeds."""
    for name in ("final", "best"):
        files = [run / name / "model.safetensors" for run in (folder, other)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    assert untimed(folder) == untimed(other)


def assert_close(folder: Path, other: Path, tolerance: float = 1e-5) -> None:
    expected = weights(other)
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=0, msg=name)
