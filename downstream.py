"""Does it help? Fine-tunes several checkpoints on a labelled task, and says which is better and how sure that is."""

import signal

from Config import DownstreamConfig, parse_downstream_flags
from mlm.errors import UserError, plain_errors
from mlm.runtime import hardware
from mlm.runtime.hub import locate

if __name__ == "__main__":  # before the imports that take seconds: help, wrong settings and a missing Hub are quick
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during an import ends without a traceback
    with plain_errors():
        settings = parse_downstream_flags()
        hardware.choose_devices(settings)
        for name in settings.models:
            locate(name, "models")

import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from data_process import cut_in_memory, evaluation_batches
from mlm.data.micro_batches import MicroBatcher
from mlm.data.tokenizer import load_pretrained_tokenizer, read_vocabulary, tokenizer_warnings
from mlm.downstream import finetuning, linear_probe, results, trials
from mlm.downstream.comparison import Candidate, Comparison, fingerprint
from mlm.downstream.contamination import count_contaminated
from mlm.downstream.encoding import encode, select
from mlm.downstream.metrics import choose_metric
from mlm.downstream.plot import save_picture
from mlm.downstream.task import Task, load_task, sample_per_class
from mlm.downstream.trials import Result, Trial
from mlm.encoder import check
from mlm.encoder.attention import has_variable_lengths
from mlm.encoder.families import has_two_token_types, longest_input
from mlm.encoder.packed import PackedClassifier, PackedEncoder, PackedMaskedLM
from mlm.evaluation.loss import evaluate
from mlm.report.page import redraw
from mlm.runtime.distributed import make_accelerator
from mlm.runtime.signals import StopRequest
from mlm.storage import digest, lock, make_folder, write_csv, write_json
from mlm.terminal import prepare_output, say
from mlm.text.lines import read_sample
from mlm.training.micro_batch_size import CPU_MICRO_BATCH_POSITIONS
from model import load_classifier, load_encoder, load_masked_lm

GPU_MICRO_BATCH_POSITIONS = 1 << 14  # positions that go through the model at once, where they fit
CHECKED_TEXTS = 3  # that each model is to compute packed as it computes each by itself
MAX_GENERAL_LINES = 2000  # that each model's perplexity is measured on


def compare_models(config: DownstreamConfig, accelerator: Accelerator) -> None:
    """Does the whole job: reads the task, tries every model with every seed, and says which is better. Raises UserError
    for whatever the user can put right."""
    comparison = set_up(config, accelerator)
    outcomes = []
    for size in different_sizes(comparison.task, config):
        tried = try_models(comparison, size)
        outcomes.append(results.summarize(comparison.task, comparison.metric, size, tried))
        say(results.describe_outcome(outcomes[-1]))
    if accelerator.is_main_process:
        with lock(comparison.folder / "trials" / "results.lock"):  # another process may end at this moment
            results.save_outcomes(comparison.folder, outcomes)
            save_picture(comparison.folder / "results.svg", outcomes)
            write_json(comparison.folder / "settings.json", asdict(config))
    if config.general_text:
        measure_general_perplexity(comparison)
    if accelerator.is_main_process:
        for name in config.models:
            redraw(Path(name).parent)
    say(f"\nEvery seed, the differences and a picture: {comparison.folder}")


def set_up(config: DownstreamConfig, accelerator: Accelerator) -> Comparison:
    """Reads the task and the models, and says what was found. Raises UserError where something is missing."""
    task = load_task(config)
    metric = choose_metric(task, config.metric)
    general_lines = []
    if config.general_text:
        general_lines = read_sample(Path(config.general_text), "general_text", MAX_GENERAL_LINES)
    say(results.describe_task(task))
    kind = "-frozen" if config.frozen else ""
    folder = Path(config.path_model_save) / "downstream" / f"{task.name}-{task.digest[:6]}{kind}"
    comparison = Comparison(config, accelerator, folder, task, metric, general_lines)
    for name in config.models:
        comparison.candidates[name] = read_candidate(comparison, name)
    say(results.describe_candidates(task, list(comparison.candidates.values())))
    make_folder(folder / "trials")
    return comparison


def read_candidate(comparison: Comparison, name: str) -> Candidate:
    """Returns a model, and the texts as its tokenizer sees them. Raises UserError where it is missing, or of no family
    that is served, or takes no texts of `sen_max_length`."""
    config, task, accelerator = comparison.config, comparison.task, comparison.accelerator
    tokenizer = load_pretrained_tokenizer(name, "models")
    encoder, warnings = load_encoder(name)
    longest = longest_input(encoder)
    if config.sen_max_length > longest:
        raise UserError(f"sen_max_length, models: {name} takes texts of at most {longest} positions")
    vocabulary = read_vocabulary(tokenizer)
    if vocabulary.size > encoder.config.vocab_size:
        raise UserError(
            f"models: the tokenizer of {name} has {vocabulary.size:,} tokens, the model {encoder.config.vocab_size:,}; "
            "they do not belong together"
        )

    # The cache key holds all that decides the model's results, so that a second call finds those of the first.
    budget = (config.num_epochs, config.min_steps, config.batch_size, config.sen_max_length)
    machine = (accelerator.device.type, hardware.choose_precision(config))
    weights = fingerprint(encoder, tokenizer)
    varlen = has_variable_lengths(encoder, 0.0, accelerator.mixed_precision)
    micro_batcher = MicroBatcher(
        vocabulary, accelerator.device, varlen, config.sen_max_length, CPU_MICRO_BATCH_POSITIONS
    )
    dev = encode(task.dev, task, tokenizer, config.sen_max_length)
    has_types = task.kind == "pair" and has_two_token_types(encoder)
    packed = PackedEncoder(encoder).to(accelerator.device)
    some = select(dev, np.arange(min(CHECKED_TEXTS, len(task.dev))))
    check.refuse_differences(packed, some, micro_batcher, accelerator, f"models: {name}")
    return Candidate(
        name=name,
        tokenizer=tokenizer,
        cache_key=digest(weights, task.digest, comparison.metric, config.frozen, machine, budget),
        micro_batcher=micro_batcher,
        sep_id=vocabulary.sep_id if has_types else None,
        dev=dev,
        test=encode(task.test, task, tokenizer, config.sen_max_length),
        contaminated=count_contaminated(name, task),
        warnings=warnings + tokenizer_warnings(tokenizer, name),
    )


def different_sizes(task: Task, config: DownstreamConfig) -> list[str]:
    """Returns examples_per_class without sizes that are all the training texts, where "all" is there too."""
    sizes = []
    for size in config.examples_per_class:
        is_all = size != "all" and len(sample_per_class(task, size, config.seed)) == len(task.train)
        if is_all:
            also = ", as all is: left out" if "all" in config.examples_per_class else ""
            say(f"note: {size} per class are all the training texts{also}")
        if not (is_all and "all" in config.examples_per_class):
            sizes.append(size)
    return sizes


def try_models(comparison: Comparison, size: str) -> dict[str, list[Result]]:
    """Returns each model's results, one per seed, with `size` training texts per class."""
    config = comparison.config
    seeds = range(config.seed, config.seed + config.num_seeds)
    if config.frozen:
        todo = [Trial(name, size, seed, None) for name in config.models for seed in seeds]
        return trials.run(comparison, todo, probe_once)

    # The first seed tries every learning rate, and dev chooses one for each model.
    first = [Trial(name, size, config.seed, rate) for name in config.models for rate in config.learning_rates]
    tried = trials.run(comparison, first, fine_tune_once)
    chosen = {name: choose_rate(name, config.learning_rates, of_rates) for name, of_rates in tried.items()}

    # The other seeds, of all models in turn, so that a comparison that is stopped has about as many of each.
    todo = [Trial(name, size, seed, chosen[name]) for seed in seeds for name in config.models]
    return trials.run(comparison, todo, fine_tune_once)


def choose_rate(model: str, rates: tuple[float, ...], tried: list[Result]) -> float:
    """Returns the learning rate that is best on dev, the middle one of equals; tried: a result for each rate. Where
    that is the lowest or the highest of all, it says so, as a rate beyond it may be better still."""
    best_score = max(result.dev_score for result in tried)
    best = [rate for rate, result in zip(rates, tried, strict=True) if result.dev_score == best_score]
    chosen = best[len(best) // 2]
    if len(best) == 1 < len(rates) and chosen in (min(rates), max(rates)):
        end, where = ("lowest", "lower") if chosen == min(rates) else ("highest", "higher")
        say(f"hint: {model} did best at the {end} of --learning_rates; a {where} one may be better still")
    return chosen


def fine_tune_once(comparison: Comparison, trial: Trial) -> Result:
    """Fine-tunes one model with one seed; begins again with smaller micro-batches where memory runs out."""
    is_cuda = comparison.accelerator.device.type == "cuda"
    positions = GPU_MICRO_BATCH_POSITIONS if is_cuda else CPU_MICRO_BATCH_POSITIONS
    micro_batcher = replace(comparison.candidates[trial.model].micro_batcher, max_positions=positions)
    while True:
        try:
            with hardware.detect_out_of_memory():
                return _fine_tune(comparison, trial, micro_batcher)
        except hardware.OutOfMemory:
            pass
        if micro_batcher.max_positions <= comparison.config.sen_max_length:
            raise UserError("sen_max_length: out of memory, though texts go through the model singly")
        micro_batcher.halve()
        say(f"out of memory; begun again with {micro_batcher.max_positions} positions at once")


def _fine_tune(comparison: Comparison, trial: Trial, micro_batcher: MicroBatcher) -> Result:
    began = time.perf_counter()
    config, accelerator, task = comparison.config, comparison.accelerator, comparison.task
    candidate = comparison.candidates[trial.model]
    drawn = [task.train[index] for index in sample_per_class(task, trial.size, trial.seed)]
    train = encode(drawn, task, candidate.tokenizer, config.sen_max_length)
    assert trial.learning_rate is not None
    budget = finetuning.Budget.for_examples(len(drawn), len(task.dev), config, trial.learning_rate)
    bert = load_classifier(trial.model, len(task.classes), trial.seed, of_words=task.kind == "entities")
    classifier = PackedClassifier(bert, candidate.sep_id).to(accelerator.device)
    try:
        best_step, dev_score = finetuning.fine_tune(
            classifier, train, candidate.dev, comparison.score_on_dev, budget, trial.seed, accelerator, micro_batcher
        )
        predictions = finetuning.predict(classifier, candidate.test, accelerator, micro_batcher)
    finally:
        del bert, classifier  # a cycle, which goes with the optimizer's
        accelerator.free_memory()  # which holds the optimizer
    return Result(trial, dev_score, predictions, time.perf_counter() - began, best_step=best_step)


def probe_once(comparison: Comparison, trial: Trial) -> Result:
    """Fits a linear probe of one model to training texts that are drawn by one seed."""
    task, candidate = comparison.task, comparison.candidates[trial.model]
    candidate.features = candidate.features or compute_features(comparison, candidate)
    began = time.perf_counter()
    train, dev, test = (candidate.features[split] for split in ("train", "dev", "test"))
    drawn = linear_probe.resample(task, sample_per_class(task, trial.size, trial.seed), trial.seed)
    rows, targets = linear_probe.select_rows(task, drawn)
    classifier, c, score = linear_probe.fit(train[rows], targets, dev, comparison.score_on_dev)
    predictions = classifier.predict(test).tolist()
    return Result(trial, score, predictions, time.perf_counter() - began, regularization_c=c)


def compute_features(comparison: Comparison, candidate: Candidate) -> dict[str, np.ndarray]:
    """Returns the features of all texts, or words, of each split."""
    task, accelerator = comparison.task, comparison.accelerator
    train = encode(task.train, task, candidate.tokenizer, comparison.config.sen_max_length)
    encoder = PackedEncoder(load_encoder(candidate.name)[0], sep_id=candidate.sep_id).to(accelerator.device)
    return {
        split: linear_probe.features(encoder, encoded, accelerator, candidate.micro_batcher)
        for split, encoded in (("train", train), ("dev", candidate.dev), ("test", candidate.test))
    }


def measure_general_perplexity(comparison: Comparison) -> None:
    """Says each model's perplexity on general text, which shows how much of it adaptation forgets."""
    candidates = comparison.candidates
    perplexities = {name: compute_perplexity(comparison, candidate) for name, candidate in candidates.items()}
    heading = f"{comparison.config.general_text}, {len(comparison.general_lines):,} line(s), masked as in train.py"
    say(results.describe_general_perplexity(perplexities, heading))
    rows = [{"model": name, **scores} for name, scores in perplexities.items() if scores]
    if rows and comparison.accelerator.is_main_process:
        write_csv(comparison.folder / "general_text.csv", list(rows[0]), rows)


def compute_perplexity(comparison: Comparison, candidate: Candidate) -> dict[str, float] | None:
    """Returns perplexity and nats per character of general_text, by train.py's evaluation; None without a head."""
    accelerator, length = comparison.accelerator, comparison.config.sen_max_length
    bert, is_head_new, _ = load_masked_lm(candidate.name, "models")
    if is_head_new:
        return None
    vocabulary = candidate.micro_batcher.vocabulary
    chunks, stats = cut_in_memory(comparison.general_lines, candidate.tokenizer, length)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    batches = evaluation_batches(chunks, vocabulary, np.arange(len(chunks)), rank, ranks)
    with accelerator.autocast():
        model = PackedMaskedLM(bert).to(accelerator.device)
        evaluation = evaluate(accelerator, model, batches, chunks.lines, candidate.micro_batcher, StopRequest())
    nats_per_character = evaluation.loss * stats.tokens / stats.characters
    return {"perplexity": evaluation.perplexity, "nats_per_character": nats_per_character}


def main(config: DownstreamConfig) -> None:
    """Raises UserError for what the user can put right; Ctrl-C ends with status 130 and loses no finished trial."""
    prepare_output()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        accelerator = make_accelerator(config)
        if accelerator.device.type == "cpu":
            hardware.keep_freed_memory()
        compare_models(config, accelerator)
    except KeyboardInterrupt:
        print("\nstopped; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    with plain_errors():
        main(settings)
