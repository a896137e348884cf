"""Experiment trackers, by the names that accelerate gives them: tensorboard, trackio, wandb, mlflow, swanlab."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from mlm.errors import UserError, first_line
from mlm.state import Progress, Run

PROJECT = "Pretrain_Bert_with_MaskLM"
TO_KEEP_IT_LOCAL = {"wandb": "WANDB_MODE=offline", "swanlab": "SWANLAB_MODE=offline"}


def check_tracker(name: str) -> None:
    """Raises UserError where a tracker is not installed, or is none that accelerate knows."""
    known = sorted({str(kind) for kind in LoggerType} - {"all"})
    if name != "none" and name not in known:
        raise UserError(f"tracker: accelerate knows no {name!r}; choose none or one of {', '.join(known)}")
    if name != "none" and name not in map(str, get_available_trackers()):
        raise UserError(f"tracker: {name} is not installed; pip install {name}, or --tracker none")


def start_tracker(run: Run, progress: Progress) -> None:
    """Opens the run in its tracker, under the name of its folder. Raises UserError where that fails.

    What is written goes under `path_model_save`, but trackio's, which has one place for all of a user's runs.
    """
    name = run.config.tracker
    arguments = ARGUMENTS.get(name, lambda *_: {})(run.folder.absolute(), progress.step if run.checkpoint else None)
    settings = {setting: value for setting, value in asdict(run.config).items() if value is not None}
    try:
        run.accelerator.init_trackers(PROJECT, config=settings, init_kwargs={name: arguments})
    except Exception as error:  # each raises what it likes, from no account to no network
        local = TO_KEEP_IT_LOCAL.get(name)
        remedy = f"keep it on this machine by {local}, or leave it out" if local else "leave it out"
        raise UserError(f"tracker: {name} could not start ({first_line(error)}); {remedy} by --tracker none") from error


def _tensorboard(folder: Path, resumed_step: int | None) -> dict[str, Any]:
    return {"purge_step": 0 if resumed_step is None else resumed_step + 1}


def _trackio(folder: Path, resumed_step: int | None) -> dict[str, Any]:
    resume = "never" if resumed_step is None else "allow"
    return {"name": folder.name, "resume": resume, "auto_log_cpu": False, "auto_log_gpu": False}


def _wandb(folder: Path, resumed_step: int | None) -> dict[str, Any]:
    os.environ.setdefault("WANDB_SILENT", "true")
    return {"name": folder.name, "dir": str(folder)}


def _mlflow(folder: Path, resumed_step: int | None) -> dict[str, Any]:
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder.parent / 'mlflow.db'}")  # one for all runs
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    return {"run_name": folder.name, "logging_dir": str(folder.parent / "mlartifacts")}


def _swanlab(folder: Path, resumed_step: int | None) -> dict[str, Any]:
    return {"name": folder.name, "log_dir": str(folder / "swanlog")}


ARGUMENTS: dict[str, Callable[[Path, int | None], dict[str, Any]]] = {
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "swanlab": _swanlab,
}
