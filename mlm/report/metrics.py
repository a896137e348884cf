"""metrics.csv and the tracker: the figures of a run, a row for each log line or evaluation."""

from accelerate import Accelerator

from mlm.errors import optional
from mlm.evaluation.loss import Change, Evaluation, compare
from mlm.storage import write_csv, write_last_row
from mlm.training.progress import Progress, SinceLastLog
from mlm.training.run import Setup

COLUMNS = (
    "step", "epoch", "train_loss", "lr", "tokens_per_s",
    "eval_loss", "eval_loss_se", "perplexity", "perplexity_se", "masked_accuracy", "test_chunks",
    "change", "change_low", "change_high", "best_step", "trend", "trend_low", "trend_high",
)  # fmt: skip


def scores(evaluation: Evaluation, change: Change | None, progress: Progress) -> dict[str, float]:
    """Returns the figures of an evaluation, of what training changed, and of what changed since the best evaluation in
    it so far, by their columns."""
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
