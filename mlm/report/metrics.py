"""metrics.csv and the tracker: the figures of a run, a row for each log line or evaluation.

Trackers go by the names that accelerate gives them: tensorboard, trackio, wandb, mlflow, swanlab.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from Config import Config
from mlm.errors import UserError, first_line, optional
from mlm.evaluation.loss import Change, Evaluation, compare
from mlm.storage import write_csv, write_last_row
from mlm.training.progress import Progress, SinceLastLog
from mlm.training.run import Setup

PROJECT = "Pretrain_Bert_with_MaskLM"
TO_KEEP_IT_LOCAL = {"wandb": "WANDB_MODE=offline", "swanlab": "SWANLAB_MODE=offline"}

COLUMNS = (
    "step", "epoch", "train_loss", "lr", "tokens_per_s",
    "eval_loss", "eval_loss_se", "perplexity", "perplexity_se", "masked_accuracy", "test_chunks",
    "change", "change_low", "change_high", "best_step", "trend", "trend_low", "trend_high",
    "general_loss", "general_loss_se", "general_perplexity", "general_test_chunks",
    "general_change", "general_change_low", "general_change_high",
)  # fmt: skip


def scores(
    evaluation: Evaluation, change: Change | None, progress: Progress, general: Evaluation | None = None
) -> dict[str, float]:
    """Returns the figures of an evaluation, of what training changed, of what changed since the best evaluation in it
    so far, and of general text, where there is such, by their columns."""
    figures = {
        "eval_loss": evaluation.loss,
        "eval_loss_se": evaluation.loss_se,
        "perplexity": evaluation.perplexity,
        "perplexity_se": evaluation.perplexity_se,
        "masked_accuracy": evaluation.accuracy,
        "test_chunks": len(evaluation.losses),
    }
    if change:
        figures |= {"change": change.loss, "change_low": change.low, "change_high": change.high}
    if progress.best:
        trend = compare(progress.best, evaluation, best_of=sum("change" in row for row in progress.metrics))
        figures |= {"best_step": progress.best_step}
        figures |= {"trend": trend.loss, "trend_low": trend.low, "trend_high": trend.high}
    if general:
        figures |= {"general_loss": general.loss, "general_loss_se": general.loss_se}
        figures |= {"general_perplexity": general.perplexity, "general_test_chunks": len(general.losses)}
    if general and progress.step and progress.general_baseline:
        forgotten = compare(progress.general_baseline, general)
        figures |= {"general_change": forgotten.loss}
        figures |= {"general_change_low": forgotten.low, "general_change_high": forgotten.high}
    return figures


def training_figures(new: SinceLastLog, learning_rate: float) -> dict[str, float]:
    """Returns the figures of the steps since the last line in the log, by their columns."""
    return {"train_loss": new.loss / new.masked_tokens, "lr": learning_rate, "tokens_per_s": new.tokens / new.seconds}


def record(figures: dict[str, float], progress: Progress, setup: Setup, accelerator: Accelerator) -> None:
    """Adds figures of the step just done to metrics.csv and the tracker."""
    rows, step = progress.metrics, progress.step
    is_new = not rows or rows[-1]["step"] != step
    if is_new:
        rows.append({"step": step, "epoch": setup.plan.epochs(step)})
    rows[-1] |= figures
    path = setup.folder / "metrics.csv"
    if accelerator.is_main_process and path.exists() and path.stat().st_size:
        write_last_row(path, COLUMNS, rows[-1], is_new)
    elif accelerator.is_main_process:  # somebody has removed or emptied it
        write_csv(path, COLUMNS, rows)
    with optional("the tracker"):
        accelerator.log(figures, step=step)


def check_tracker(name: str) -> None:
    """Raises UserError where a tracker is not installed, or is none that accelerate knows."""
    known = sorted({str(kind) for kind in LoggerType} - {"all"})
    if name != "none" and name not in known:
        raise UserError(f"tracker: accelerate knows no {name!r}; choose none or one of {', '.join(known)}")
    if name != "none" and name not in map(str, get_available_trackers()):
        raise UserError(f"tracker: {name} is not installed; pip install {name}, or --tracker none")


def start_tracker(accelerator: Accelerator, config: Config, run_folder: Path, resumed_step: int | None) -> None:
    """Opens the run in its tracker, under the name of its folder. Raises UserError where that fails.

    resumed_step: the one of the checkpoint that the run goes on from, or None.

    What is written goes under `path_model_save`, but trackio's, which has one place for all of a user's runs.
    """
    name, folder = config.tracker, run_folder.absolute()
    resume = "never" if resumed_step is None else "allow"
    arguments: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": 0 if resumed_step is None else resumed_step + 1},
        "trackio": {"name": folder.name, "resume": resume, "auto_log_cpu": False, "auto_log_gpu": False},
        "wandb": {"name": folder.name, "dir": str(folder)},
        "mlflow": {"run_name": folder.name, "logging_dir": str(folder.parent / "mlartifacts")},
        "swanlab": {"name": folder.name, "log_dir": str(folder / "swanlog")},
    }
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder.parent / 'mlflow.db'}")  # one for all runs
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    settings = {setting: value for setting, value in asdict(config).items() if value is not None}
    try:
        accelerator.init_trackers(PROJECT, config=settings, init_kwargs={name: arguments.get(name, {})})
    except Exception as error:  # each raises what it likes, from no account to no network
        local = f"keep it on this machine by {TO_KEEP_IT_LOCAL[name]}, or " if name in TO_KEEP_IT_LOCAL else ""
        reason = f"tracker: {name} could not start ({first_line(error)})"
        raise UserError(f"{reason}; {local}leave it out by --tracker none") from error
