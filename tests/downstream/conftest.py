"""A comparison in this process, and an accelerator that leaves no state behind."""

from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator
from runs import reset_process_state

import downstream
from Config import DownstreamConfig


@pytest.fixture
def compare(tmp_path) -> Callable[..., Path]:
    """Compares models in this process; returns the folder with the results."""

    def run(task: Path, *models: str, **changes) -> Path:
        usual = {"num_epochs": 1, "min_steps": 12, "learning_rates": (1e-3,), "mixed_precision": "no"}
        usual["examples_per_class"] = ("all",)
        usual |= {"path_model_save": str(tmp_path / "output")}
        config = DownstreamConfig(task=str(task), models=models, **usual | changes)
        try:
            downstream.main(config)
        finally:
            reset_process_state()
        folders = (tmp_path / "output" / "downstream").iterdir()
        return max(folders, key=lambda folder: (folder / "results.csv").stat().st_mtime)

    return run


@pytest.fixture
def accelerator():
    yield Accelerator(mixed_precision="no")
    reset_process_state()
