"""A dry run: predicts time, memory and disk of a run by some seconds of its own work, which are thrown away."""

import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import psutil
import torch

from mlm.data.micro_batches import Prefetcher
from mlm.data.text_stats import histogram, text_warnings
from mlm.errors import UserError
from mlm.evaluation.fill_mask import guess, save_predictions
from mlm.evaluation.loss import Evaluation
from mlm.report.summary import publish
from mlm.runtime.distributed import decide_on_main
from mlm.runtime.hardware import count_gpus, native_precision
from mlm.storage import sizes
from mlm.terminal import render, with_error
from mlm.training.checkpoint import checkpoint_path, save_checkpoint, save_model
from mlm.training.plan import TimeLeft, middle_sample, time_left
from mlm.training.progress import Progress, SinceLastLog
from mlm.training.run import Run
from mlm.training.step import take_step

WARM_UP_STEPS = 3  # that are not timed: the first ones find memory, and may compile
TIMED_SECONDS = 15.0  # of steps, about
MOST_TIMED_STEPS = 500
SCORED_CHUNKS = 1024  # of the test text
WORTH_A_HINT = 0.1  # share of the time, or of the text


class Estimate(NamedTuple):
    """What the whole run takes, with its text prepared."""

    baseline: Evaluation  # of some test chunks
    general: Evaluation | None  # of some of general text
    trained_steps: int
    tokens_per_s: float
    start_seconds: float  # until the first evaluation begins
    left: TimeLeft  # from then on
    memory_bytes: int  # of this process
    gpu_bytes: int  # of its GPU; 0 without
    disk_bytes: int  # of the run's folder, at the end
    saving_bytes: int  # beside these, while a checkpoint is written
    free_bytes: int

    @property
    def seconds(self) -> float:
        return self.start_seconds + self.left.seconds


def measure(
    run: Run,
    progress: Progress,
    batches: Prefetcher,
    score: Callable[[int], tuple[Evaluation, Evaluation | None]],
    load_text: Callable[[], object],
) -> Estimate:
    """Evaluates, trains and saves for some seconds in the run's folder, which is to be thrown away.

    score: evaluates the model on a number of test chunks, and of general text; load_text: loads the text.
    """
    # The whole run will find its text prepared: it starts in the time of this process until now, with the second load
    # in place of the preparation.
    load_text()
    start_seconds = time.time() - psutil.Process().create_time() - run.timings.prepare_text

    setup, plan = run.setup, run.setup.plan
    is_cuda = run.learner.accelerator.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()  # the trial for the size of micro-batches has tried what did not fit
    baseline, general = score(min(plan.test_chunks, SCORED_CHUNKS))
    progress.baseline, progress.general_baseline = baseline, general
    trained = _train_some_steps(run, progress, batches)
    if not trained.tokens:
        reason = "no step of the dry run had a finite loss and gradient, so the run would end early"
        raise UserError(f"learning_rate: {reason}; most often a lower rate helps")
    model_bytes, checkpoint_bytes = _save_once(run, progress)

    start, keep = plan.cooldown_from, setup.config.keep_checkpoints
    keeps_one_more = start is not None and plan.saves_left(start) >= keep  # that where the cool-down begins
    models = 3 if start is not None and plan.evaluate_every <= start else 2  # final/, best/, and in it the best by then
    tokens_per_s = trained.tokens / trained.seconds
    at_the_start = Progress(sampled_chunks=middle_sample(plan, run.corpus.test, baseline))
    left = time_left(plan, at_the_start, run.timings, plan.tokens_per_step / tokens_per_s)
    return Estimate(
        baseline=baseline,
        general=general,
        trained_steps=progress.step,
        tokens_per_s=tokens_per_s,
        start_seconds=start_seconds,
        left=left,
        memory_bytes=_peak_memory(),
        gpu_bytes=torch.cuda.max_memory_reserved() if is_cuda else 0,
        disk_bytes=models * model_bytes + min(left.checkpoints, keep + keeps_one_more) * checkpoint_bytes,
        saving_bytes=checkpoint_bytes if left.checkpoints else model_bytes,
        free_bytes=shutil.disk_usage(setup.folder).free,
    )


def _train_some_steps(run: Run, progress: Progress, batches: Prefetcher) -> SinceLastLog:
    """Returns what the steps after the first few took."""
    setup, last_step = run.setup, run.setup.plan.steps
    take = partial(take_step, run.learner, progress, batches, setup.plan, setup.config, run.stop)
    for _ in range(min(WARM_UP_STEPS, last_step - 1)):
        take()
    warm_up, progress.since_last_log = progress.since_last_log, SinceLastLog()
    seconds_per_step = max(1e-3, warm_up.seconds / max(1, warm_up.steps))
    steps = min(MOST_TIMED_STEPS, max(3, round(TIMED_SECONDS / seconds_per_step)))
    for _ in range(min(decide_on_main(run.learner.accelerator, lambda: steps), last_step - progress.step)):
        take()
    return progress.since_last_log


def _save_once(run: Run, progress: Progress) -> tuple[int, int]:
    """Writes what follows an evaluation, a checkpoint, and predictions. Returns the bytes of model and checkpoint."""
    if not run.is_main:
        return 0, 0
    setup, bert, corpus = run.setup, run.learner.bert, run.corpus
    with run.timings.measure("write_results"):
        save_model(setup.folder / "best", bert, corpus.tokenizer)
        guesses = guess(bert, run.hidden_words, corpus.tokenizer)
        publish(setup, progress, corpus.stats, run.hidden_words, guesses, ending=None)
    with run.timings.measure("save_checkpoint"):
        save_checkpoint(setup, run.learner, corpus.tokenizer, progress)
    save_predictions(setup.folder / "predictions.csv", bert, corpus, setup.config.sen_max_length)  # for its memory
    model, checkpoint = setup.folder / "best", checkpoint_path(setup.folder, progress.step)
    return sum(sizes(model).values()), sum(sizes(checkpoint).values())


def _peak_memory() -> int:
    """The most memory, in bytes, that this process has held so far."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe_estimate(run: Run, estimate: Estimate) -> str:
    """Returns one screen: text, model, steps, speed, time, memory, disk, and what would make it faster."""
    config, stats, general = run.setup.config, run.corpus.stats, estimate.general
    warnings = [*run.corpus.text.notes, *text_warnings(stats, config.initial_pretrain_tokenizer, only_test=False)]
    if estimate.disk_bytes + estimate.saving_bytes > estimate.free_bytes:
        fewer = min(estimate.left.checkpoints, config.keep_checkpoints) > 1
        remedy = "; a lower --keep_checkpoints needs less" if fewer else ""
        warnings.insert(0, f"warning: the disk is too small for that{remedy}")
    return render(
        "report/templates/dry_run.txt",
        run=run,
        estimate=estimate,
        perplexity=with_error(estimate.baseline.perplexity, estimate.baseline.perplexity_se),
        general=run.corpus.general.stats if run.corpus.general else None,
        general_perplexity=with_error(general.perplexity, general.perplexity_se) if general else "",
        lengths=histogram(stats.train, config.sen_max_length),
        hints=_hints_for_speed(run, estimate),
        warnings=warnings,
    ).rstrip()


def _hints_for_speed(run: Run, estimate: Estimate) -> list[str]:
    """Returns what would make the run faster, as far as it can be seen here."""
    config, train = run.setup.config, run.corpus.stats.train
    evaluating = estimate.left.evaluation_seconds / estimate.seconds
    removable, native = run.corpus.stats.removable_lines / train.lines, native_precision()
    applies = {
        f"--mixed_precision {native}: this machine computes in it": (config.mixed_precision == "no" and native != "no"),
        "a GPU: none is used": count_gpus() == 0,
        "--attention_dropout 0: allows the fast attention kernels": count_gpus() and config.attention_dropout,
        f"--max_test_chunks {SCORED_CHUNKS}: evaluations take {evaluating:.0%} of the time": (
            evaluating > WORTH_A_HINT and run.setup.plan.test_chunks > SCORED_CHUNKS
        ),
        f"--drop_duplicates: {removable:.0%} of the training lines repeat an earlier one or stand in the test text": (
            removable > WORTH_A_HINT and not config.drop_duplicates
        ),
    }
    return [hint for hint, is_due in applies.items() if is_due]
