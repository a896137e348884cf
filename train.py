"""Continue the masked-language-model pre-training of BERT, or of its kin, on your own text: set up, fit, finish."""

import signal

from Config import Config, defaults_of, parse_flags
from mlm.errors import UserError, optional, plain_errors
from mlm.runtime import hardware, hub

if __name__ == "__main__":  # before the imports that take seconds: help, wrong settings and a missing Hub are quick
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during an import ends without a traceback
    with plain_errors():
        settings = parse_flags()
        hardware.choose_devices(settings)
        hub.locate_downloads(settings)

import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import cast

from accelerate import Accelerator
from tqdm import tqdm
from transformers import PreTrainedModel

import data_process
from mlm.data.chunks import Chunks, Corpus, count_tokens, steps_per_epoch
from mlm.data.micro_batches import MicroBatcher, Prefetcher
from mlm.data.tokenizer import tokenizer_warnings
from mlm.encoder import check
from mlm.encoder.attention import has_variable_lengths
from mlm.encoder.families import habits, longest_input
from mlm.encoder.packed import PackedMaskedLM
from mlm.evaluation import fill_mask, loss
from mlm.randomness import evaluation_sample
from mlm.report import dry_run, metrics, model_card, page, summary, wording
from mlm.runtime import distributed
from mlm.runtime.signals import Stopped, translate_failures
from mlm.settings import repeat_command
from mlm.storage import atomic_write, write_csv
from mlm.terminal import prepare_output, say, steps_bar
from mlm.training import checkpoint, endings, micro_batch_size, step
from mlm.training.optimizer import make_optimizer
from mlm.training.plan import Timings, make_plan, middle_sample, resolve, time_left
from mlm.training.progress import Progress, SinceLastLog
from mlm.training.run import Ending, Learner, Run, Setup, derive_numbers
from mlm.training.run_folder import run_folder
from model import load_model, starting_config


def train(config: Config, accelerator: Accelerator, folder: Path) -> None:
    """Does the whole job under `folder`: prepare, evaluate the baseline, train, evaluate, save, finish.

    Resumes from the folder's newest checkpoint, if it has one. Raises UserError for whatever the user can put right,
    and SystemExit once a run that was told to stop has saved a checkpoint.
    """
    run = set_up(config, accelerator, folder)
    if run is None:
        return
    progress = begin(run)
    if config.dry_run:
        predict_cost(run, progress)
        return
    ending = fit(run, progress)
    finish(run, progress, ending)


def set_up(given: Config, accelerator: Accelerator, folder: Path) -> Run | None:
    """Prepares text and model and says what was found; None where that is all that was asked for. Raises UserError
    where something is missing or does not fit."""
    # Lines of text become chunks of tokens, once for all runs on this text.
    timings = Timings()
    with timings.measure("prepare_text"):
        corpus = data_process.load_corpus(given)
    epoch_steps = steps_per_epoch(len(corpus.train), given.domain_chunks)
    start = starting_config(given)
    config = resolve(given, epoch_steps, hardware.choose_precision(given), start.hidden_size, habits(start))

    # A checkpoint is resumed if it is of this very training: the same settings, text, words and tokenizer.
    recipe = checkpoint.make_recipe(config, corpus)
    distributed.refuse_differences(recipe)
    resumed, warnings = distributed.decide_on_main(accelerator, lambda: checkpoint.find_checkpoint(folder, recipe))
    if resumed:
        config = replace(config, num_warmup_steps=checkpoint.refuse_changes(resumed, recipe))
        recipe["settings"] = asdict(config)
    plan = make_plan(config, corpus)

    # The weights: the checkpoint's, or those to start from.
    vocabulary, ids = corpus.vocabulary, corpus.tokenizer.get_vocab()
    added = {ids[word]: subwords for word, subwords in corpus.added_words.items()}
    bert, model_warnings = load_model(
        config, vocabulary.size, vocabulary.pad_id, resumed, added,
        count_tokens=lambda: count_tokens(corpus.train, vocabulary.size),
    )  # fmt: skip

    # What was found, for the user.
    derived = derive_numbers(accelerator, bert, corpus, plan)
    if not config.dry_run:  # which says all of it later, on one screen
        say(wording.describe_run(given, config, corpus, derived))
    idle = hardware.hints(accelerator.num_processes, plan.positions_per_step, config.batch_size, len(corpus.train))
    of_tokenizer = tokenizer_warnings(corpus.tokenizer, config.initial_pretrain_tokenizer)
    for line in [*warnings, *of_tokenizer, *model_warnings, *idle]:
        say(line)
    if config.check_only:
        say("Settings and text are in order.")
        return None

    command = repeat_command("train.py", given, defaults_of(given), without=("resume", "run_name", "dry_run"))
    setup = Setup(config, plan, folder, resumed, recipe, derived, command)
    return Run(setup, corpus, make_learner(config, bert, corpus, accelerator), timings)


def make_learner(config: Config, bert: PreTrainedModel, corpus: Corpus, accelerator: Accelerator) -> Learner:
    """Makes the model as it is trained: it takes packed rows, and has a place and an optimizer on every device. Raises
    UserError where it would compute something else of them than of single lines."""
    packed = PackedMaskedLM(bert, config.attention_dropout)
    if config.compile:
        packed.compile(dynamic=True)  # once for all sizes of batches
    rate, decay = cast(float, config.learning_rate), cast(float, config.weight_decay)
    optimizer = make_optimizer(packed, config.optimizer, rate, decay, accelerator.mixed_precision)
    model, optimizer = accelerator.prepare(packed, optimizer)
    if accelerator.device.type == "cpu":
        hardware.keep_freed_memory()
    micro_batcher = MicroBatcher(
        vocabulary=corpus.vocabulary,
        device=accelerator.device,
        varlen=has_variable_lengths(bert, config.attention_dropout, accelerator.mixed_precision),
        longest_chunk=config.sen_max_length,
        max_positions=micro_batch_size.CPU_MICRO_BATCH_POSITIONS,
    )
    sample, start = check.sample(corpus.test, corpus.vocabulary, packed), config.initial_pretrain_model
    check.refuse_differences(packed, sample, micro_batcher, accelerator, f"initial_pretrain_model: {start}")
    return Learner(accelerator, bert, model, optimizer, micro_batcher)


def begin(run: Run) -> Progress:
    """Returns where the run stands: at the checkpoint that it resumes from, or before the first step."""
    # The state of the checkpoint, or that of a new run.
    setup, corpus, learner, accelerator = run.setup, run.corpus, run.learner, run.learner.accelerator
    if run.is_main:  # which alone shows them
        max_tokens = longest_input(learner.bert) - 2  # without [CLS] and [SEP]
        lines = corpus.text.test()
        run.hidden_words = fill_mask.hide_words(lines, corpus.train, corpus.tokenizer, corpus.vocabulary, max_tokens)
    if setup.resumed:
        progress = checkpoint.load_checkpoint(setup.resumed, setup.plan.steps, learner.bert, learner.optimizer)
        run.timings.saved_step = progress.step
        say(f"resumed from {setup.resumed}")
    else:
        progress = Progress()
        with optional("guessing hidden words"):
            progress.baseline_guesses = fill_mask.guess(learner.bert, run.hidden_words, corpus.tokenizer)
        if setup.config.resume:
            say(f"{setup.folder} has no checkpoint yet, so it begins at the first step")
    size = micro_batch_size.choose(learner, setup.config, progress.micro_batch_tokens)
    learner.micro_batcher.max_positions = size
    plan = setup.plan.cooling_down_from(progress.cooldown_from)
    setup = run.setup = replace(setup, plan=plan, derived=setup.derived | {"micro_batch_tokens": size})

    # The tracker and the files, without what a run wrote after the checkpoint that it is resumed from.
    if accelerator.log_with:
        metrics.start_tracker(accelerator, setup.config, setup.folder, progress.step if setup.resumed else None)
    if run.is_main:
        if setup.resumed:
            checkpoint.reopen_models(setup.folder, setup.resumed)
        summary.save_settings(setup)
        write_csv(setup.folder / "metrics.csv", metrics.COLUMNS, progress.metrics)

    # Several ranks, which from now on have to answer within minutes, sum gradients in one order from the first step on.
    if accelerator.num_processes > 1:
        distributed.watch_each_other(setup.config)
        step.warm_up_reducer(learner)
    return progress


def predict_cost(run: Run, progress: Progress) -> None:
    """Says what the whole run will take, by some seconds of its own work in a folder that is thrown away."""
    estimate = dry_run.measure(
        run, progress, prefetch(run, progress),
        score=lambda number: evaluate_chunks(run, number),
        load_text=lambda: data_process.load_corpus(run.setup.config),
    )  # fmt: skip
    say(dry_run.describe_estimate(run, estimate))
    run.learner.shut_down()


def fit(run: Run, progress: Progress) -> Ending:
    """Trains to an ending: evaluates, saves and reports on the way."""
    config = run.setup.config
    if not config.evaluate_only:
        run.stop.listen(speak=run.is_main)
    batches = prefetch(run, progress)
    run.timings.saved_at = time.perf_counter()  # nothing is unsaved yet
    with steps_bar(run.setup.plan.steps, progress.step, shown=run.is_main) as bar:
        while True:  # here `progress.step` steps are done
            # When due, and before the first step and after the last: how good is it on the test text?
            is_new = progress.last_evaluated_step < progress.step
            if is_new and run.setup.plan.is_evaluation_due(progress.step) and not run.stop.is_agreed:
                with suppress(Stopped):  # the ending below says so
                    evaluate_and_keep_best(run, progress)

            # When due, and where a run is stopped or given up: save what it takes to resume.
            ending = endings.find_ending(run.setup, progress, run.learner, run.stop.is_agreed)
            checkpoint.save_if_due(run, progress, ending)
            if ending:
                return ending

            # One more step, and when due a line about those since the last.
            plan = run.setup.plan
            bar.total = plan.steps
            step.take_step(run.learner, progress, batches, plan, config, run.stop)
            bar.update()
            if progress.step % config.log_every == 0 or progress.step == plan.steps:
                log_training(run, progress, bar)


def prefetch(run: Run, progress: Progress) -> Prefetcher:
    """Returns the batches of the steps from where the run stands to its last one; an early stop leaves some."""
    batches = data_process.replaying_batches(run.setup.config, run.corpus, progress.step, *run.learner.place)
    prefetcher = Prefetcher(islice(batches, run.setup.plan.steps - progress.step), run.learner.micro_batcher)
    prefetcher.over_ranks = step.sum_counts(run.learner.accelerator, prefetcher.counts)
    return prefetcher


def evaluate_and_keep_best(run: Run, progress: Progress) -> None:
    """Scores the model on the test text and keeps the best in best/. Raises Stopped where a signal comes meanwhile."""
    # The last evaluation scores the whole test text, or as much as is allowed; the others a sample of it.
    setup, corpus, plan = run.setup, run.corpus, run.setup.plan
    evaluation, general = evaluate_chunks(run, plan.chunks_at_the_ends.get(progress.step, progress.sampled_chunks))
    if progress.baseline is None:
        progress.baseline, progress.general_baseline = evaluation, general
        progress.sampled_chunks = middle_sample(plan, corpus.test, evaluation)

    # The scores, and what training changed, go to the log, metrics.csv, the tracker and the report.
    with run.timings.measure("write_results"):
        change = loss.compare(progress.baseline, evaluation) if progress.step else None
        say(wording.describe_evaluation(setup, corpus, progress.step, evaluation, change, general))
        metrics.record(metrics.scores(evaluation, change, progress, general), progress, setup, run.learner.accelerator)
        progress.last_evaluated_step = progress.step
        setup = run.setup = endings.stop_early(setup, progress, run.learner, evaluation)
        if progress.cooldown_from == progress.step:
            run.timings.saved_step = None  # a checkpoint of this step, where a signal came, does not know of it
        if run.is_main:
            loss.save_evaluation(setup.folder / summary.SCORES, evaluation, progress.step)
            with optional("report.html"):
                page.write_report(publish(run, progress))

        # The best weights of the training so far, by the same chunks each time, go to best/.
        sample = evaluation.first(progress.sampled_chunks)
        is_best = sample.loss < (progress.best.loss if progress.best else float("inf"))
        if progress.step and is_best and step.has_finite_weights(run.learner.bert):
            progress.best, progress.best_step = sample, progress.step
            if run.is_main:
                with atomic_write(setup.folder / "best") as temporary:
                    checkpoint.save_model(temporary, run.learner.bert, corpus.tokenizer)


def evaluate_chunks(run: Run, number: int) -> tuple[loss.Evaluation, loss.Evaluation | None]:
    """Scores the model on a sample of `number` test chunks, and on at most as many of general text, where there is
    such. Raises Stopped where a signal comes meanwhile."""
    learner, general = run.learner, run.corpus.general

    def score(test: Chunks) -> loss.Evaluation:
        sample = evaluation_sample(len(test), min(number, len(test)))
        batches = data_process.evaluation_batches(test, run.corpus.vocabulary, sample, *learner.place)
        lines, batcher = test.lines[sample], learner.micro_batcher
        return loss.evaluate(learner.accelerator, learner.model, batches, lines, batcher, run.stop)

    with run.timings.measure("score_chunk", pieces=number):
        return score(run.corpus.test), score(general.test) if general else None


def log_training(run: Run, progress: Progress, bar: tqdm) -> None:
    """Writes loss, learning rate and speed since the last such line, and the time left."""
    new, plan = progress.since_last_log, run.setup.plan
    if not new.masked_tokens:  # all steps were skipped
        return
    figures = metrics.training_figures(new, plan.learning_rate(progress.step - 1))
    seconds = time_left(plan, progress, run.timings, new.seconds / new.steps).seconds
    left = f"{tqdm.format_interval(seconds)} left"
    say(f"{wording.describe_training(progress.step, plan, figures)}, {left}")
    bar.set_postfix_str(f"{left}, loss {figures['train_loss']:.3f}")
    metrics.record(figures, progress, run.setup, run.learner.accelerator)
    progress.since_last_log = SinceLastLog()


def finish(run: Run, progress: Progress, ending: Ending) -> None:
    """Saves the finished model in final/ and says what came of the run, or why it ended early. Raises UserError where
    it diverged, SystemExit where it was told to stop."""
    setup = run.setup
    result = save_results(run, progress, ending) if run.is_main and progress.baseline else None
    run.learner.shut_down()

    # What came of it is said, with the exit status that fits.
    if result and ending in (Ending.FINISHED, Ending.EVALUATED):
        say(wording.closing_words(result))
    if result and ending is Ending.FINISHED and setup.config.push_to_hub:
        say(hub.push(setup.folder / "final", setup.config.push_to_hub))
    if ending is Ending.STOPPED:
        saved = checkpoint.checkpoint_path(setup.folder, progress.step)
        say(f"stopped after step {progress.step}, saved in {saved}. To go on, run the same command with --resume")
        sys.exit(run.stop.exit_status)
    if ending in (Ending.SKIPPING, Ending.BROKEN):
        if not run.is_main:
            sys.exit(2)
        raise UserError(wording.describe_divergence(setup, progress, ending, run.timings.saved_step))


def save_results(run: Run, progress: Progress, ending: Ending) -> summary.Summary:
    """Writes how the run ended: of a finished one the model in final/, and then what decorates it."""
    folder, bert, corpus = run.setup.folder, run.learner.bert, run.corpus
    result = publish(run, progress, ending)
    if ending is Ending.FINISHED:
        with atomic_write(folder / "final") as temporary:
            checkpoint.save_model(temporary, bert, corpus.tokenizer)
            with optional("the model card"):
                model_card.make_card(result, corpus.text.test()).save(temporary / "README.md")
    with optional("report.html"):
        page.write_report(result)
    if ending in (Ending.FINISHED, Ending.EVALUATED):
        with optional("predictions.csv"):
            fill_mask.save_predictions(folder / "predictions.csv", bert, corpus, run.setup.config.sen_max_length)
    return result


def publish(run: Run, progress: Progress, ending: Ending | None = None) -> summary.Summary:
    """Writes what came of the run so far to its folder; on the main rank, once the baseline is evaluated."""
    guesses = []
    if ending not in (Ending.BROKEN, Ending.SKIPPING):
        with optional("guessing hidden words"):
            guesses = fill_mask.guess(run.learner.bert, run.hidden_words, run.corpus.tokenizer)
    return summary.publish(run.setup, progress, run.corpus.stats, run.hidden_words, guesses, ending)


def main(config: Config) -> None:
    """Sets up the devices, the tracker and the run's folder, and trains. Raises UserError; SystemExit on a signal."""
    prepare_output()
    with translate_failures(config):
        tracker = "none" if config.dry_run or config.evaluate_only else config.tracker
        metrics.check_tracker(tracker)
        accelerator = distributed.make_accelerator(config, tracker, config.path_model_save)
        with run_folder(config, accelerator) as folder:
            accelerator.project_configuration.logging_dir = str(folder / "tensorboard")
            train(config, accelerator, folder)


if __name__ == "__main__":
    with plain_errors():
        main(settings)
