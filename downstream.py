"""Does it help? Fine-tunes several checkpoints on a labelled task, and says which is better and how sure that is."""

import signal

from Config import Config, DownstreamConfig, parse_downstream_flags
from mlm.errors import UserError, plain_errors
from mlm.hub import locate
from mlm.machine import choose_devices, has_variable_length_kernels, keep_freed_memory, ran_out_of_memory

if __name__ == "__main__":  # before the imports that take seconds: help, wrong settings and a missing Hub are quick
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during an import ends without a traceback
    with plain_errors():
        settings = parse_downstream_flags()
        choose_devices(settings)
        for name in settings.models:
            locate(name, "models")

import sys
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from data_process import evaluation_batches
from mlm.batches import Divide, StepQueue, make_micro_batches
from mlm.chunks import Chunks, write_chunks
from mlm.comparison import compare
from mlm.encoding import Encoded, encode
from mlm.evaluation import evaluate
from mlm.finetuning import Budget, answer, fine_tune
from mlm.frozen import features, fit, resample
from mlm.leakage import count_read_before
from mlm.memory import CPU_MICRO_BATCH_POSITIONS
from mlm.ranks import make_accelerator, quiet_libraries
from mlm.report import say
from mlm.scores import Metric, choose_metric, count_answers, metrics_of
from mlm.storage import digest
from mlm.tasks import Task, draw_few, load_task
from mlm.text import read_sample
from mlm.trials import Result, Trial, Trials, fingerprint
from mlm.verdict import (
    Known,
    Outcome,
    describe_candidates,
    describe_known,
    describe_outcome,
    describe_task,
    save_known,
    save_outcomes,
    say_result,
    trial_bar,
)
from mlm.vocabulary import load_pretrained_tokenizer, read_vocabulary
from mlm.words import make_encoders, make_segmenter
from model import PackedBert, PackedClassifier, PackedMaskedLM, load_classifier, load_encoder, load_model

GPU_MICRO_BATCH_POSITIONS = 1 << 14  # positions that go through the model at once, where they fit
MOST_GENERAL_LINES = 2000  # of which each model guesses hidden words


@dataclass(eq=False)
class Candidate:
    """A model to be compared."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str  # of weights and tokenizer
    head_size: int  # of attention
    dev: Encoded
    test: Encoded
    read_before: int | None  # test texts that it was pre-trained on, as far as that can be seen


@dataclass(eq=False)
class Comparison:
    """What is built once, and kept to the end."""

    config: DownstreamConfig
    accelerator: Accelerator
    folder: Path
    task: Task
    metric_name: str
    metric: Metric
    candidates: dict[str, Candidate]
    trials: Trials

    def score_on_dev(self, answers: list[int]) -> float:
        return float(self.metric(count_answers(self.task, answers, self.task.dev).sum(0)))


def compare_models(config: DownstreamConfig, accelerator: Accelerator) -> None:
    """The whole job: reads the task, tries every model with every seed, and says what came of it.

    Raises UserError for whatever the user can put right.
    """
    comparison = set_up(config, accelerator)
    outcomes = []
    for size in config.examples_per_class:
        results = try_models(comparison, size)
        outcomes.append(judge(comparison, size, results))
        say(describe_outcome(outcomes[-1]))
    if accelerator.is_main_process:
        save_outcomes(comparison.folder, outcomes)
    if config.general_text:
        measure_forgetting(comparison, config.general_text)
    say(f"\nEvery seed, the differences and a picture: {comparison.folder}")


# -------------------------------------------------------------------------------------------------------------- set up


def set_up(config: DownstreamConfig, accelerator: Accelerator) -> Comparison:
    """Reads the task and the models, and says what was found. Raises UserError where something is missing."""
    task = load_task(config)
    metric_name = choose_metric(task, config.metric)
    say(describe_task(task))

    # The models, each with the texts as its tokenizer sees them.
    candidates = {name: read_candidate(name, task, config) for name in config.models}
    say(describe_candidates(task, list(candidates.values())))

    # All that decides a trial has a part in its file's name, so that a second call finds what a first has done.
    budget = (config.num_epochs, config.least_steps, config.batch_size, config.sen_max_length)
    precision = accelerator.mixed_precision
    decided_by = {
        name: digest(candidate.fingerprint, task.digest, metric_name, config.frozen, precision, budget)
        for name, candidate in candidates.items()
    }
    kind = "-frozen" if config.frozen else ""
    folder = Path(config.path_model_save) / "downstream" / f"{task.name}-{task.digest[:6]}{kind}"
    trials = Trials(folder / "trials", decided_by)
    metric = metrics_of(task)[metric_name]
    return Comparison(config, accelerator, folder, task, metric_name, metric, candidates, trials)


def read_candidate(name: str, task: Task, config: DownstreamConfig) -> Candidate:
    """Raises UserError where the model is missing, or is no BERT, or takes no texts of `sen_max_length`."""
    tokenizer = load_pretrained_tokenizer(name, "models")
    encoder = load_encoder(name)
    longest = encoder.config.max_position_embeddings
    if config.sen_max_length > longest:
        raise UserError(f"sen_max_length, models: {name} takes texts of at most {longest} positions")
    if len(tokenizer) > encoder.config.vocab_size:
        raise UserError(
            f"models: the tokenizer of {name} has {len(tokenizer):,} tokens, the model {encoder.config.vocab_size:,}; "
            "they do not belong together"
        )
    return Candidate(
        name=name,
        tokenizer=tokenizer,
        fingerprint=fingerprint(encoder, tokenizer),
        head_size=encoder.config.hidden_size // encoder.config.num_attention_heads,
        dev=encode(task.dev, task, tokenizer, config.sen_max_length),
        test=encode(task.test, task, tokenizer, config.sen_max_length),
        read_before=count_read_before(name, task.test),
    )


# -------------------------------------------------------------------------------------------------------------- trials


def try_models(comparison: Comparison, size: str) -> dict[str, list[Result]]:
    """Each model's results, one a seed, with `size` training texts a class."""
    config, trials = comparison.config, comparison.trials
    seeds = range(config.seed, config.seed + config.seeds)
    if config.frozen:
        todo = [Trial(name, size, seed, 0.0) for name in config.models for seed in seeds]
        results = trials.do(todo, partial(fit_features, comparison), say_result)
        return {name: [result for result in results if result.model == name] for name in config.models}

    # The first seed tries every learning rate, and dev chooses one for each model.
    first = [Trial(name, size, config.seed, rate) for name in config.models for rate in config.learning_rates]
    tried = trials.do(first, partial(fine_tune_once, comparison), say_result)
    chosen = {}
    for name in config.models:
        of_model = [result for result in tried if result.model == name]
        chosen[name] = max(of_model, key=lambda result: result.dev_score).setting

    # The other seeds, model by model in turn, so that a comparison that is stopped has the same seeds of each.
    todo = [Trial(name, size, seed, chosen[name]) for seed in seeds for name in config.models]
    results = trials.do(todo, partial(fine_tune_once, comparison), say_result)
    return {name: [result for result in results if result.model == name] for name in config.models}


def fine_tune_once(comparison: Comparison, trial: Trial) -> Result:
    """Fine-tunes one model with one seed, in smaller micro-batches where memory runs out."""
    positions = GPU_MICRO_BATCH_POSITIONS if comparison.accelerator.device.type == "cuda" else CPU_MICRO_BATCH_POSITIONS
    while True:
        try:
            return _fine_tune(comparison, trial, positions)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            if positions <= comparison.config.sen_max_length:
                raise UserError("sen_max_length: out of memory, though texts go through the model singly") from error
            positions //= 2
            say(f"out of memory; begun again with {positions} positions at once")


def _fine_tune(comparison: Comparison, trial: Trial, positions: int) -> Result:
    began = time.perf_counter()
    config, accelerator, task = comparison.config, comparison.accelerator, comparison.task
    candidate = comparison.candidates[trial.model]
    drawn = [task.train[index] for index in draw_few(task, trial.size, trial.seed)]
    train = encode(drawn, task, candidate.tokenizer, config.sen_max_length).chunks
    budget = Budget.of(
        len(train.lengths), config.num_epochs, config.least_steps, config.batch_size, trial.learning_rate
    )
    bert = load_classifier(trial.model, len(task.classes), trial.seed, of_words=task.kind == "entities")
    classifier = PackedClassifier(bert, read_vocabulary(candidate.tokenizer).sep_id).to(accelerator.device)
    divide = partial(divider(comparison, candidate), positions=positions)
    with trial_bar(trial, budget.steps) as bar:
        best = fine_tune(
            classifier,
            train,
            lambda: comparison.score_on_dev(answer(classifier, candidate.dev, accelerator, divide)),
            budget,
            trial.seed,
            accelerator,
            divide,
            bar.update,
        )
    answers = answer(classifier, candidate.test, accelerator, divide)
    accelerator.free_memory()
    seconds = time.perf_counter() - began
    return Result(trial.model, trial.size, trial.seed, trial.learning_rate, best.step, best.score, seconds, answers)


def fit_features(comparison: Comparison, trial: Trial) -> Result:
    """Logistic regression on the features of one model, on training texts drawn anew by one seed."""
    train, dev, test = (features_of(comparison, trial.model, split) for split in ("train", "dev", "test"))
    began = time.perf_counter()
    task = comparison.task
    drawn = resample(task, draw_few(task, trial.size, trial.seed), trial.seed)
    numbers = {name: number for number, name in enumerate(task.classes)}
    classes_of = [[numbers[label] for label in example.labels] for example in task.train]
    ends = np.cumsum([len(classes) for classes in classes_of])  # (examples,) in the answers of all training examples
    rows = np.concatenate([np.arange(ends[index] - len(classes_of[index]), ends[index]) for index in drawn])
    classes = np.concatenate([classes_of[index] for index in drawn])
    classifier, penalty, score = fit(train[rows], classes, dev, comparison.score_on_dev)
    answers = classifier.predict(test).tolist()
    seconds = time.perf_counter() - began
    return Result(trial.model, trial.size, trial.seed, penalty, 0, score, seconds, answers)


@cache
def features_of(comparison: Comparison, model: str, split: str) -> np.ndarray:
    """The features (texts or words, hidden) of a split, computed once."""
    candidate, accelerator = comparison.candidates[model], comparison.accelerator
    examples = getattr(comparison.task, split)
    encoded = encode(examples, comparison.task, candidate.tokenizer, comparison.config.sen_max_length)
    encoder = PackedBert(load_encoder(model)).to(accelerator.device)
    divide = partial(divider(comparison, candidate), positions=CPU_MICRO_BATCH_POSITIONS)
    return features(encoder, encoded, accelerator, divide)


def divider(comparison: Comparison, candidate: Candidate) -> Divide:
    """Lays chunks out for a candidate; the positions that go through it at once are to be given."""
    accelerator = comparison.accelerator
    return partial(
        make_micro_batches,
        vocabulary=read_vocabulary(candidate.tokenizer),
        device=accelerator.device,
        varlen=has_variable_length_kernels(0.0, accelerator.mixed_precision, candidate.head_size),
    )


# -------------------------------------------------------------------------------------------------------------- answer


def judge(comparison: Comparison, size: str, results: dict[str, list[Result]]) -> Outcome:
    """Scores of all models and seeds, and each model's gain over the first."""
    task = comparison.task
    counts = np.stack(
        [[count_answers(task, result.answers, task.test) for result in of_model] for of_model in results.values()]
    )  # (models, seeds, texts, 3, classes)
    scores = {name: metric(counts.sum(2)) for name, metric in metrics_of(task).items()}  # (models, seeds) each
    gains = dict(zip(list(results)[1:], compare(counts, comparison.metric), strict=True))
    return Outcome(task, size, comparison.metric_name, results, scores, gains)


# ---------------------------------------------------------------------------------------------------------- forgetting


def measure_forgetting(comparison: Comparison, path: str) -> None:
    """Says how well each model still guesses hidden words of general text. Raises UserError where there is no text."""
    lines = read_sample(Path(path), "general_text", MOST_GENERAL_LINES)
    known = {}
    for name in comparison.config.models:
        known[name] = ask_for_hidden_words(comparison, comparison.candidates[name], lines)
    say(describe_known(known, path, len(lines)))
    if comparison.accelerator.is_main_process:
        save_known(comparison.folder, known)


def ask_for_hidden_words(comparison: Comparison, candidate: Candidate, lines: list[str]) -> Known | None:
    """A model's perplexity on lines, by train.py's evaluation; None where it has no head for that."""
    length, accelerator = comparison.config.sen_max_length, comparison.accelerator
    vocabulary = read_vocabulary(candidate.tokenizer)
    as_start = Config(
        initial_pretrain_model=candidate.name, initial_pretrain_tokenizer=candidate.name, sen_max_length=length
    )
    bert, warnings = load_model(as_start, vocabulary.size, vocabulary.pad_id)
    if warnings:  # that the head is missing
        return None
    with TemporaryDirectory() as scratch:
        path = Path(scratch, "general.arrow")
        encoders = make_encoders(candidate.tokenizer)
        stats = write_chunks(iter(lines), path, length - 2, encoders, make_segmenter([]), vocabulary).stats
        batches = evaluation_batches(Chunks.read(path), vocabulary)
        divide = divider(comparison, candidate)
        queue = StepQueue(iter(()), divide, CPU_MICRO_BATCH_POSITIONS, length)
        with accelerator.autocast():
            model = PackedMaskedLM(bert).to(accelerator.device)
            evaluation, _ = evaluate(accelerator, model, batches, queue, signals=[])
    return Known(evaluation.perplexity, evaluation.loss * stats.tokens / stats.characters)


def main(config: DownstreamConfig) -> None:
    """Raises UserError for what the user can put right; Ctrl-C ends with status 130 and loses no finished trial."""
    cast(Any, sys.stdout).reconfigure(line_buffering=True)  # a log file shows each line at once
    quiet_libraries()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        accelerator = make_accelerator(config)
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        compare_models(config, accelerator)
    except KeyboardInterrupt:
        print("\nstopped; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    with plain_errors():
        main(settings)
