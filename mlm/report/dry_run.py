"""A dry run: some seconds of a run's own work, thrown away, say what time, memory and disk the whole will take."""

import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from tqdm import tqdm

from mlm.data.micro_batches import Prefetcher
from mlm.data.text_stats import histogram, text_warnings
from mlm.evaluation.fill_mask import guess, save_predictions
from mlm.evaluation.loss import Evaluation
from mlm.report.summary import pair_guesses, publish
from mlm.runtime.distributed import decide_on_main
from mlm.runtime.hardware import count_gpus, native_precision
from mlm.terminal import with_error
from mlm.training.checkpoint import checkpoint_path, save_checkpoint, save_model
from mlm.training.plan import middle_sample
from mlm.training.progress import Progress, SinceLastLog
from mlm.training.run import Run
from mlm.training.step import take_step
from mlm.training.timing import TimeLeft, time_left

WARM_UP_STEPS = 3  # that are not timed: the first ones find memory, and may compile
TIMED_SECONDS = 15.0  # of steps, about
MOST_TIMED_STEPS = 500
SCORED_CHUNKS = 1024  # of the test text
WORTH_A_HINT = 0.1  # share of the time, or of the text
BAR_WIDTH = 40  # characters


class Estimate(NamedTuple):
    """What the whole run takes, with its text prepared."""

    baseline: Evaluation  # of some test chunks
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
    score: Callable[[int], Evaluation],
    load_text: Callable[[], object],
) -> Estimate:
    """Evaluates, trains and saves for some seconds in the run's folder, which is to be thrown away.

    score: evaluates the model on a number of test chunks; load_text: loads the text.
    """
    # The whole run will find its text prepared: until its first evaluation it takes what this one took, but for the
    # preparation, which is replaced by a second load.
    age_seconds = time.time() - psutil.Process().create_time()
    prepare_seconds = run.timings.prepare_text
    with run.timings.measure("prepare_text"):
        load_text()
    start_seconds = age_seconds - prepare_seconds + run.timings.prepare_text

    setup, plan = run.setup, run.setup.plan
    baseline = score(min(plan.test_chunks, SCORED_CHUNKS))
    progress.baseline = baseline
    trained = _train_some_steps(run, progress, batches)
    model_bytes, checkpoint_bytes = _save_once(run, progress)

    tokens_per_s = trained.tokens / trained.seconds
    at_the_start = Progress(sampled_chunks=middle_sample(plan, run.corpus.test, baseline))
    left = time_left(plan, at_the_start, run.timings, plan.tokens_per_step / tokens_per_s)
    is_cuda = run.learner.accelerator.device.type == "cuda"
    return Estimate(
        baseline=baseline,
        trained_steps=progress.step,
        tokens_per_s=tokens_per_s,
        start_seconds=start_seconds,
        left=left,
        memory_bytes=_peak_memory(),
        gpu_bytes=torch.cuda.max_memory_reserved() if is_cuda else 0,
        disk_bytes=2 * model_bytes + min(left.checkpoints, setup.config.keep_checkpoints) * checkpoint_bytes,
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
    steps = decide_on_main(
        run.learner.accelerator, lambda: min(MOST_TIMED_STEPS, round(TIMED_SECONDS / seconds_per_step))
    )
    for _ in range(min(max(steps, 3), last_step - progress.step)):
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
        guessed = pair_guesses(run.hidden_words, progress.baseline_guesses, guesses)
        publish(setup, progress, corpus.stats, guessed, ending=None)
    with run.timings.measure("save_checkpoint"):
        save_checkpoint(setup, run.learner, corpus.tokenizer, progress)
    save_predictions(setup.folder / "predictions.csv", bert, corpus, setup.config.sen_max_length)  # for its memory
    return _bytes(setup.folder / "best"), _bytes(checkpoint_path(setup.folder, progress.step))


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _peak_memory() -> int:
    """The most memory, in bytes, that this process has held so far."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------------------------- for people


def describe_estimate(run: Run, estimate: Estimate) -> str:
    """One screen: text, model, steps, speed, time, memory, disk, and what would make it faster."""
    config, plan, stats = run.setup.config, run.setup.plan, run.corpus.stats
    train = stats.train
    text = [
        f"{train.lines:,} training lines of {train.tokens:,} tokens, {stats.test.lines:,} test lines",
        f"{train.unknown / train.tokens:.2%} [UNK]; {train.duplicate:,} lines repeat an earlier one; "
        f"{stats.test_lines_in_train:,} test lines are also training lines",
        "",
        *_draw_lengths(histogram(train, config.sen_max_length)),
        "",
    ]
    chunks = len(estimate.baseline.losses)
    perplexity = with_error(estimate.baseline.perplexity, estimate.baseline.perplexity_se)
    model = [
        f"{config.initial_pretrain_model}, {run.setup.derived['parameters']:,} parameters",
        f"perplexity before training: {perplexity}, on {chunks:,} of {len(run.corpus.test):,} test chunks",
    ]
    steps = (
        f"{plan.steps:,} of {min(config.batch_size, len(run.corpus.train)):,} chunks, "
        f"{plan.epochs(plan.steps):.3g} epochs, on {run.setup.derived['devices']}, {config.mixed_precision}"
    )
    left, as_time = estimate.left, tqdm.format_interval
    time_for = {
        "start": estimate.start_seconds,
        "steps": left.step_seconds,
        f"{left.evaluations:,} evaluation(s)": left.evaluation_seconds,
        f"{left.checkpoints:,} checkpoint(s)": left.checkpoint_seconds,
    }
    parts = ", ".join(f"{what} {as_time(seconds)}" for what, seconds in time_for.items())
    memory = _size(estimate.memory_bytes) + (" for each process" if run.learner.accelerator.num_processes > 1 else "")
    if estimate.gpu_bytes:
        memory += f", and {_size(estimate.gpu_bytes)} of its GPU's"
    else:  # keep_freed_memory, mlm/runtime/hardware.py
        memory += " so far; up to twice as much in a long run, which keeps what is freed for the next step"
    disk = (
        f"{_size(estimate.disk_bytes)} in the run's folder, {_size(estimate.saving_bytes)} more while it saves; "
        f"{_size(estimate.free_bytes)} are free"
    )
    screen = {
        "text": text,
        "model": model,
        "steps": [steps],
        "speed": [f"{estimate.tokens_per_s:,.0f} tokens/s"],
        "time": [f"{as_time(estimate.seconds)}: {parts}"],
        "memory": [memory],
        "disk": [disk],
        "faster": hints_for_speed(run, estimate),
    }
    lines = [f"dry run: {estimate.trained_steps} steps, one evaluation and one checkpoint, all thrown away", ""]
    for name, parts_of in screen.items():
        lines += [f"{name if number == 0 else '':<10}{line}".rstrip() for number, line in enumerate(parts_of)]
    if estimate.disk_bytes + estimate.saving_bytes > estimate.free_bytes:
        lines.append("warning: the disk is too small for that; a lower --keep_checkpoints needs less")
    return "\n".join([*lines, *text_warnings(stats, config.initial_pretrain_tokenizer, only_test=False)])


def _draw_lengths(counts: list[tuple[str, int]]) -> list[str]:
    """How many lines have so many tokens, as bars."""
    most = max(number for _, number in counts)
    lines = ["tokens of a line      lines"]
    for label, number in counts:
        bar = "█" * round(BAR_WIDTH * number / most) or ("▏" if number else "")
        lines.append(f"{label:>16} {number:>10,}  {bar}".rstrip())
    return lines


def _size(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def hints_for_speed(run: Run, estimate: Estimate) -> list[str]:
    """What would make the run faster, as far as it can be seen here."""
    config, train = run.setup.config, run.corpus.stats.train
    hints = []
    if config.mixed_precision == "no" and native_precision() != "no":
        hints.append(f"--mixed_precision {native_precision()}: this machine computes in it")
    if count_gpus() == 0:
        hints.append("a GPU: none is used")
    if count_gpus() and config.attention_dropout:
        hints.append("--attention_dropout 0: allows the fast attention kernels")
    if (
        estimate.left.evaluation_seconds > WORTH_A_HINT * estimate.seconds
        and run.setup.plan.test_chunks > SCORED_CHUNKS
    ):
        share = estimate.left.evaluation_seconds / estimate.seconds
        hints.append(f"--max_test_chunks {SCORED_CHUNKS}: evaluations take {share:.0%} of the time")
    if train.duplicate > WORTH_A_HINT * train.lines:
        hints.append(
            f"fewer duplicates: {train.duplicate / train.lines:.0%} of the training lines repeat an earlier one"
        )
    return hints
