"""metrics.csv and the tracker: the figures of a run, row by row."""

from pathlib import Path
from typing import Any

from mlm.storage import write_csv
from mlm.training.run import Progress, Run

COLUMNS = (
    "step", "epoch", "train_loss", "lr", "tokens_per_s",
    "eval_loss", "eval_loss_se", "perplexity", "perplexity_se", "masked_accuracy", "test_chunks",
    "change", "change_low", "change_high",
)  # fmt: skip


def record(run: Run, progress: Progress, figures: dict[str, float]) -> None:
    """Adds figures of the step just done to metrics.csv and the tracker."""
    step = progress.step
    if not progress.rows or progress.rows[-1]["step"] != step:
        progress.rows.append({"step": step, "epoch": step / run.steps_per_epoch})
    progress.rows[-1] |= figures
    run.accelerator.log(figures, step=step)
    if run.is_main:
        write_metrics(run.folder / "metrics.csv", progress.rows)


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes metrics.csv, one row per log line or evaluation; what a row does not measure stays empty."""
    write_csv(path, COLUMNS, rows)
