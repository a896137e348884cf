"""Continue a BERT's masked-language-model pre-training on your own text: set up, fit, finish."""

import signal

from Config import Config, parse_flags
from mlm.errors import UserError, plain_errors
from mlm.runtime.hardware import choose_devices, choose_precision, has_variable_length_kernels, hints, keep_freed_memory
from mlm.runtime.hub import locate_downloads, push

if __name__ == "__main__":  # before the imports that take seconds: help, wrong settings and a missing Hub are quick
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during an import ends without a traceback
    with plain_errors():
        settings = parse_flags()
        choose_devices(settings)
        locate_downloads(settings)

import math
import sys
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator

from data_process import evaluation_batches, load_corpus, training_batches, training_rule
from mlm.data.micro_batches import StepQueue, make_micro_batches
from mlm.evaluation.fill_mask import guess, save_predictions
from mlm.evaluation.hidden_words import hide_words
from mlm.evaluation.loss import Evaluation, compare, evaluate
from mlm.report.console import describe_divergence, describe_run, report_evaluation, report_if_due
from mlm.report.dry_run import describe_estimate, measure
from mlm.report.metrics import write_metrics
from mlm.report.model_card import make_card
from mlm.report.page import write_report
from mlm.report.summary import Summary, publish
from mlm.report.trackers import check_tracker, start_tracker
from mlm.report.wording import closing_words
from mlm.runtime.distributed import (
    decide_on_main,
    make_accelerator,
    quiet_libraries,
    refuse_differences,
    shorten_timeouts,
    shut_down,
)
from mlm.runtime.signals import catch_signals, explain_endings
from mlm.settings import repeat_command
from mlm.storage import atomic_write, write_json
from mlm.terminal import say, steps_bar
from mlm.training.checkpoint import (
    find_checkpoint,
    is_save_due,
    load_checkpoint,
    make_recipe,
    refuse_changes,
    save_if_due,
    save_model,
)
from mlm.training.micro_batch_size import micro_batch_positions
from mlm.training.plan import resolve
from mlm.training.run import Ending, Pace, Progress, Run, checkpoint_path, derive_numbers
from mlm.training.run_folder import run_folder
from mlm.training.step import has_finite_weights, make_optimizer, patience, train_step, warm_up_reducer
from mlm.training.time_left import choose_sample
from model import PackedMaskedLM, load_model

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "numpy")


def train(config: Config, accelerator: Accelerator, folder: Path) -> None:
    """The whole job, under `folder`: prepare, evaluate the start, train, evaluate, save, finish.

    Resumes from the folder's newest checkpoint, if it has one. Raises UserError for whatever the user can put right,
    and SystemExit once a run that was told to stop has saved a checkpoint.
    """
    run = set_up(config, accelerator, folder)
    if run is None:
        return
    progress = begin(run)
    if config.dry_run:
        rehearse(run, progress)
        return
    ending = fit(run, progress)
    finish(run, progress, ending)


# -------------------------------------------------------------------------------------------------------------- set up


def set_up(given: Config, accelerator: Accelerator, folder: Path) -> Run | None:
    """Prepares text and model and says what was found; None where that is all that was asked for.

    Raises UserError where something is missing or does not fit.
    """
    # Lines of text become chunks of tokens, once for all runs on this text.
    pace = Pace()
    with pace.timing("preparing the text"):
        data = load_corpus(given)
    steps_per_epoch = math.ceil(len(data.train) / given.batch_size)
    config = resolve(given, steps_per_epoch, choose_precision(given))

    # A checkpoint is resumed if it is of this very training: the same settings, text, words and tokenizer.
    recipe = make_recipe(config, data.text.digest, data.tokenizer)
    refuse_differences(recipe)
    checkpoint, checkpoint_warnings = decide_on_main(accelerator, lambda: find_checkpoint(folder))
    if checkpoint:
        refuse_changes(checkpoint, recipe)

    # The weights: the checkpoint's, or those to start from.
    vocabulary, added_words = data.vocabulary, list(data.added_words.values())
    bert, model_warnings = load_model(config, vocabulary.size, vocabulary.pad_id, checkpoint, added_words)

    # What was found, for the user.
    derived = derive_numbers(accelerator, data, bert, steps_per_epoch)
    if not config.dry_run:  # which says all of it later, on one screen
        say(describe_run(given, config, data, derived))
    idle = hints(accelerator.num_processes, derived["positions_per_step"], config.batch_size, len(data.train))
    for line in checkpoint_warnings + model_warnings + idle:
        say(line)
    if config.check_only:
        say("Settings and text are in order.")
        return None

    # The model as it is trained: it takes packed rows, is compiled if asked for, and has a place on every device.
    packed = PackedMaskedLM(bert)
    if config.compile:
        packed.compile(dynamic=True)  # once for all sizes of batches
    model, optimizer = accelerator.prepare(packed, make_optimizer(packed, config.learning_rate, config.weight_decay))
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    head_size = bert.config.hidden_size // bert.config.num_attention_heads
    varlen = has_variable_length_kernels(config.attention_dropout, accelerator.mixed_precision, head_size)
    hidden_words = []
    if accelerator.is_main_process:  # which alone shows them
        hidden_words = hide_words(islice(data.text.test(), 2000), data.train, data.tokenizer, vocabulary)

    return Run(
        config=config,
        accelerator=accelerator,
        folder=folder,
        data=data,
        hidden_words=hidden_words,
        derived=derived,
        versions={name: version(name) for name in PACKAGES},
        command=repeat_command("train.py", given, Config(), without=("resume", "run_name", "dry_run")),
        recipe=recipe,
        checkpoint=checkpoint,
        bert=bert,
        model=model,
        optimizer=optimizer,
        divide=partial(make_micro_batches, vocabulary=vocabulary, device=accelerator.device, varlen=varlen),
        pace=pace,
        signals=[],
    )


def begin(run: Run) -> Progress:
    """Where the run stands: at the checkpoint that it resumes from, or before the first step."""
    # The state of the checkpoint, or that of a new run.
    if run.checkpoint:
        progress = load_checkpoint(run.checkpoint, run.bert, run.optimizer)
        run.pace.saved_step = progress.step
        say(f"resumed from {run.checkpoint}")
    else:
        progress = Progress(guesses_before=guess(run.bert, run.hidden_words, run.data.tokenizer))
        if run.config.resume:
            say(f"{run.folder} has no checkpoint yet, so it begins at the first step")
    run.derived["micro_batch_tokens"] = micro_batch_positions(run, progress)

    # The tracker and the files, without what a killed run wrote after its checkpoint.
    if run.accelerator.log_with:
        start_tracker(run, progress)
    if run.is_main:
        written = {"settings": asdict(run.config), "derived": run.derived, "versions": run.versions}
        write_json(run.folder / "settings.json", written | {"command": run.command})
        write_metrics(run.folder / "metrics.csv", progress.rows)

    # Several ranks, which from now on have to answer within minutes, sum gradients in one order from the first step on.
    if run.accelerator.num_processes > 1:
        shorten_timeouts()
        warm_up_reducer(run)
    return progress


def rehearse(run: Run, progress: Progress) -> None:
    """Says what the whole run will take, by some seconds of its own work in a folder that is thrown away."""
    queue = fill_queue(run, progress)
    measured = measure(run, progress, queue, partial(evaluate_chunks, run, queue), partial(load_corpus, run.config))
    say(describe_estimate(run, measured))
    del run.model, run.optimizer
    shut_down(run.accelerator)


# ----------------------------------------------------------------------------------------------------------------- fit


def fit(run: Run, progress: Progress) -> Ending:
    """Trains to an ending: evaluates, saves and reports on the way."""
    if not run.config.evaluate_only:
        catch_signals(run.signals, speak=run.is_main)
    queue = fill_queue(run, progress)
    told_to_stop = False
    with steps_bar(run.config.max_steps, progress.step, shown=run.is_main) as bar:
        while True:  # here `progress.step` steps are done
            # When due, and before the first step and after the last: how good is it on the test text?
            if is_evaluation_due(run, progress) and not told_to_stop:
                told_to_stop = evaluate_and_keep_best(run, progress, queue)

            # When due, and where a run ends before its time: save what it takes to resume.
            ending = find_ending(run, progress, told_to_stop)
            save_if_due(run, progress, queue, ending)
            if ending:
                return ending

            # One more step, and when due a line about those since the last.
            told_to_stop = train_step(run, progress, queue)
            bar.update()
            report_if_due(run, progress, bar)


def fill_queue(run: Run, progress: Progress) -> StepQueue:
    """The batches of the steps from where the run stands to its last one."""
    config, accelerator, data = run.config, run.accelerator, run.data
    batches = training_batches(
        data.train, data.vocabulary, training_rule(config), config.seed, config.batch_size,
        progress.step, accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    remaining = islice(batches, config.max_steps - progress.step)
    return StepQueue(remaining, run.divide, micro_batch_positions(run, progress), config.sen_max_length)


def is_evaluation_due(run: Run, progress: Progress) -> bool:
    """Whether the model is to be evaluated now, and was not yet."""
    step = progress.step
    return progress.evaluated < step and (step % run.config.eval_every == 0 or step == run.config.max_steps)


def evaluate_and_keep_best(run: Run, progress: Progress, queue: StepQueue) -> bool:
    """Scores the model on the test text and keeps the best in best/. Returns True if a signal stopped it."""
    # The first and the last evaluation score the whole test text, or as much as is allowed; the others a sample of it.
    at_an_end = progress.step in (0, run.config.max_steps)
    evaluation = evaluate_chunks(run, queue, run.test_chunks if at_an_end else progress.sampled_chunks)
    if evaluation is None:
        return True
    if progress.start is None:
        progress.start = evaluation
        progress.sampled_chunks = choose_sample(run, evaluation)

    # The scores, and what training changed, go to the log, metrics.csv, the tracker and the report.
    with run.pace.timing("keeping what was found"):
        change = compare(progress.start, evaluation) if progress.step else None
        report_evaluation(run, progress, evaluation, change)
        progress.evaluated = progress.step
        if run.is_main:
            write_report(publish(run, progress, evaluation))

        # The best weights of the training so far, by the same chunks each time, go to best/.
        loss = evaluation.first(progress.sampled_chunks).loss
        best_loss = math.inf if progress.best_loss is None else progress.best_loss
        if progress.step and loss < best_loss and has_finite_weights(run.bert):
            progress.best_loss = loss
            if run.is_main:
                with atomic_write(run.folder / "best") as temporary:
                    save_model(temporary, run.bert, run.data.tokenizer)
    return False


def evaluate_chunks(run: Run, queue: StepQueue, number: int) -> Evaluation | None:
    """The model on a sample of so many test chunks, or None where a signal stopped it."""
    accelerator, data, positions = run.accelerator, run.data, queue.micro_batch_positions
    rank, ranks = accelerator.process_index, accelerator.num_processes
    batches = evaluation_batches(data.test, data.vocabulary, number, rank, ranks)
    with run.pace.timing("scoring a chunk", pieces=number):
        evaluation = evaluate(accelerator, run.model, batches, number, queue, run.signals)
    if queue.micro_batch_positions < positions:
        say(f"out of memory in an evaluation; micro-batches of {queue.micro_batch_positions} are used from now on")
    return evaluation


def find_ending(run: Run, progress: Progress, told_to_stop: bool) -> Ending | None:
    """Why the run ends now, or None where it goes on. Weights that are to be saved are checked to be finite."""
    if run.config.evaluate_only:
        return Ending.EVALUATED
    is_finished = progress.step == run.config.max_steps
    is_skipping = progress.skipped_in_a_row >= patience(run.accelerator)
    ends = is_finished or is_skipping or told_to_stop
    if (ends or is_save_due(run, progress)) and not has_finite_weights(run.bert):
        return Ending.BROKEN
    if is_skipping:
        return Ending.SKIPPING
    if told_to_stop:
        return Ending.STOPPED
    return Ending.FINISHED if is_finished else None


# -------------------------------------------------------------------------------------------------------------- finish


def finish(run: Run, progress: Progress, ending: Ending) -> None:
    """Saves the finished model in final/ and says what came of the run, or why it ended before.

    Raises UserError where it diverged, SystemExit where it was told to stop.
    """
    summary = save_results(run, progress, ending) if run.is_main and progress.start else None
    del run.model, run.optimizer
    shut_down(run.accelerator)

    # What came of it is said, with the exit status that fits.
    if summary and ending in (Ending.FINISHED, Ending.EVALUATED):
        say(closing_words(summary))
    if summary and ending is Ending.FINISHED and run.config.push_to_hub:
        say(push(run.folder / "final", run.config.push_to_hub))
    if ending is Ending.STOPPED:
        saved = checkpoint_path(run.folder, progress.step)
        say(f"stopped after step {progress.step}, saved in {saved}. To go on, run the same command with --resume")
        sys.exit(128 + (run.signals[0] if run.signals else signal.SIGTERM))  # else another rank received it
    if ending in (Ending.SKIPPING, Ending.BROKEN):
        if not run.is_main:
            sys.exit(2)
        raise UserError(describe_divergence(run, progress, ending))


def save_results(run: Run, progress: Progress, ending: Ending) -> Summary:
    """Writes how the run ended; of a finished one predictions and, last of all, the model with its card in final/."""
    summary = publish(run, progress, ending=ending)
    write_report(summary)
    if ending in (Ending.FINISHED, Ending.EVALUATED):
        save_predictions(run.folder / "predictions.csv", run.bert, run.data, run.config.sen_max_length)
    if ending is Ending.FINISHED:
        with atomic_write(run.folder / "final") as temporary:
            save_model(temporary, run.bert, run.data.tokenizer)
            make_card(summary, run.data.text.test()).save(temporary / "README.md")
    return summary


def main(config: Config) -> None:
    """Sets up the devices, the tracker and the run's folder, and trains. Raises UserError; SystemExit on a signal."""
    cast(Any, sys.stdout).reconfigure(line_buffering=True)  # a log file shows each line at once
    quiet_libraries()
    with explain_endings(config):
        tracker = "none" if config.dry_run or config.evaluate_only else config.tracker
        check_tracker(tracker)
        accelerator = make_accelerator(config, tracker, config.path_model_save)
        with run_folder(config, accelerator) as folder:
            accelerator.project_configuration.logging_dir = str(folder / "tensorboard")
            train(config, accelerator, folder)


if __name__ == "__main__":
    with plain_errors():
        main(settings)
