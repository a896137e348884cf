"""Continue a BERT's masked-language-model pre-training on your own text: prepare, baseline, train, evaluate, save."""

import signal

from Config import SCRATCH_SIZES, Config, UserError, describe, parse_flags, plain_errors
from hub import locate_downloads
from machine import (
    check_devices,
    choose_devices,
    choose_precision,
    count_gpus,
    has_variable_length_kernels,
    hints,
    keep_freed_memory,
)

if __name__ == "__main__":  # before the imports that take seconds: help, wrong settings and a missing Hub are quick
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in an import is no traceback
    with plain_errors():
        settings = parse_flags()
        choose_devices(settings)
        locate_downloads(settings)

import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from platform import python_version
from typing import Any
from warnings import filterwarnings

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from filelock import Timeout
from safetensors import SafetensorError
from torch.distributed import DistBackendError
from tqdm import tqdm

import data_process as data
from checkpoint import Progress, find_checkpoint, find_run, load_checkpoint, refuse_changes, save_checkpoint
from demo import write_corpus
from model import PackedMaskedLM, has_finite_weights, load_model, save_model
from report import Evaluation, closing_words, guess, hide_words, perplexity, write_json, write_metrics
from storage import digest, lock, once, whole
from text import find_text
from vocabulary import Vocabulary, load_tokenizer, read_vocabulary
from words import add_words, read_words

ROW_TOKENS = 192  # in about a row, where a mask keeps the chunks of a row apart
CPU_MICRO_BATCH_TOKENS = 3072  # more slow large models down, fewer small ones
LARGEST_MICRO_BATCH_TOKENS = 1 << 16  # more fill no GPU better
EVALUATION_CHUNKS = 256  # chunks packed together in an evaluation
LARGEST_SAVE_SHARE = 0.05  # of the time that checkpoints may take at the ends of epochs
DROPOUT = 3  # a stream of random numbers; data_process has the others
HOPELESS_STEPS = 5  # steps in a row without a finite loss and gradient that end a run
FP16_HALVINGS = 16  # so many more where a scaler may first have to halve its 65,536 down to 1
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "numpy")


def train(config: Config, accelerator: Accelerator, folder: Path) -> None:
    """The whole job, under `folder`: prepare, evaluate the start, train, evaluate, save, finish.

    Goes on from the folder's newest checkpoint, if it has one. Raises UserError for whatever the user can put right,
    and SystemExit once a run that was told to stop has saved a checkpoint.
    """
    # ------------------------------------------------------------------------------------------------- prepare
    main, device = accelerator.is_main_process, accelerator.device
    say = tqdm.write if main else lambda text: None  # a print would tear the progress bar
    rank, ranks = accelerator.process_index, accelerator.num_processes
    if config.demo:
        corpus = Path(config.path_model_save) / ".cache" / f"demo-{python_version()}"
        config = replace(config, path_datasets=str(once(corpus, write_corpus)))
    text = find_text(config)
    tokenizer = load_tokenizer(config, text.train, text.digest)
    added = add_words(tokenizer, data.words_to_add(config, text, tokenizer))
    vocabulary = read_vocabulary(tokenizer)
    chunks, test_chunks, found = data.prepare(config, text, tokenizer, vocabulary)
    steps_per_epoch = math.ceil(chunks.number / config.batch_size)
    given, config = config, resolve(config, steps_per_epoch, accelerator.mixed_precision)

    recipe = {"text": text.digest, "tokenizer": digest(tokenizer.backend_tokenizer.to_str())}
    recipe["user_words"] = digest(read_words(config.user_words, "user_words"))
    if any(other != recipe for other in gather_object([recipe])):
        raise UserError(
            "path_datasets: text, words or tokenizer differ between the machines; each needs the same files"
        )
    recipe["settings"] = asdict(config)
    checkpoint, passed_over = decide_on_main(accelerator, lambda: find_checkpoint(folder))
    if checkpoint:
        refuse_changes(checkpoint, recipe)
    bert, warnings = load_model(config, vocabulary.size, vocabulary.pad_id, checkpoint, list(added.values()))
    derived = {
        "devices": f"{ranks} x {device.type}",
        "parameters": sum(parameter.numel() for parameter in bert.parameters()),
        "added_words": len(added),
        "chunks": chunks.number,
        "steps_per_epoch": steps_per_epoch,
        "tokens_per_step": round(len(chunks.tokens) / steps_per_epoch),
    }
    say(f"settings (* differs from Config.py's default)\n{describe(config, given)}\n")
    say(f"text\n{data.describe_text(found, config.initial_pretrain_tokenizer)}\n")
    if added:
        say(f"added to the vocabulary\n   {', '.join(added)}\n")
    say("derived\n" + "".join(f"   {name:<26}  {value}\n" for name, value in derived.items()))
    for line in passed_over + warnings + hints(ranks, derived["tokens_per_step"]):
        say(line)
    if config.check_only:
        return say("Settings and text are in order.")

    model = PackedMaskedLM(bert)
    if config.compile:
        model.compile(dynamic=True)  # once for all sizes of batches
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, others = ([p for p in trained if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # BERT's own epsilon: with 1e-8 Adam would blow the rounding noise of the smallest gradients up into steps.
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, eps=1e-6, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    head_size = bert.config.hidden_size // bert.config.num_attention_heads
    varlen = has_variable_length_kernels(config, accelerator.mixed_precision, head_size)
    cut = partial(micro_batches, vocabulary=vocabulary, device=device, varlen=varlen)
    if device.type == "cpu":
        keep_freed_memory()
    if not config.micro_batch_tokens:
        config = replace(config, micro_batch_tokens=fit_memory(accelerator, model, cut, vocabulary, config))
        say(f"micro_batch_tokens: {config.micro_batch_tokens:,} fit the memory")
    rule = data.MaskRule(
        config.mlm_probability,
        config.mask_replace_prob,
        config.random_replace_prob,
        config.whole_words_mask,
        config.mask_span,
    )
    hidden_words = hide_words(islice(text.test(), 2000), tokenizer) if main else []
    if checkpoint:
        progress = load_checkpoint(checkpoint, bert, optimizer)
        say(f"resumed from {checkpoint}")
    else:
        progress = Progress(guesses_before=guess(bert, hidden_words, tokenizer))
        if config.resume:
            say(f"{folder} has no checkpoint yet, so it begins at the first step")
    if main:
        versions = {name: version(name) for name in PACKAGES}
        write_json(folder / "settings.json", {"settings": asdict(config), "derived": derived, "versions": versions})
        write_metrics(folder / "metrics.csv", progress.rows)  # what a killed run wrote after its checkpoint goes
    if accelerator.log_with:
        redone = {"purge_step": progress.step + 1 if checkpoint else 0}  # what is newer was logged by a killed run
        accelerator.init_trackers("Pretrain_Bert_with_MaskLM", init_kwargs={"tensorboard": redone})
    if ranks > 1:
        # DistributedDataParallel regroups the gradients after its first backward pass, and so sums over more than two
        # ranks in another order. Were that first pass a step, it would round differently in a resumed run.
        nothing = torch.zeros((1, 1), dtype=torch.long, device=device)
        (0 * model(nothing, nothing, masked=nothing[0, :0], sequence_ids=nothing).sum()).backward()
        optimizer.zero_grad()

    def record(step: int, figures: dict[str, float]) -> None:
        if not progress.rows or progress.rows[-1]["step"] != step:
            progress.rows.append({"step": step, "epoch": step / steps_per_epoch})
        progress.rows[-1] |= figures
        accelerator.log(figures, step=step)
        if main:
            write_metrics(folder / "metrics.csv", progress.rows)

    # --------------------------------------------------------------------------------------------------- train
    signals, stop, first = catch_signals(main), False, progress.step
    patience = HOPELESS_STEPS + (FP16_HALVINGS if accelerator.scaler is not None else 0)
    micro_batch_tokens = config.micro_batch_tokens
    steps = data.training_steps(chunks, vocabulary, rule, config.seed, config.batch_size, first, rank, ranks)
    upcoming = next(steps)
    queued = cut(upcoming.chunks, micro_batch_tokens)
    shown = main and sys.stderr.isatty()
    saved, save_seconds = time.perf_counter(), 0.0
    bar = tqdm(total=config.max_steps, initial=first, unit="step", disable=not shown)
    for step in range(first, config.max_steps + 1):  # in each turn `step` steps are done; the last one trains no more
        finished = step == config.max_steps

        # --------------------------------------------------------------------------------- evaluate, save
        if (step % config.eval_every == 0 or finished) and progress.evaluated < step and not stop:
            evaluation, stop = evaluate(
                accelerator, model, test_chunks, vocabulary, partial(cut, tokens=micro_batch_tokens), signals
            )
            if not stop:
                say(f"step {step}/{config.max_steps}, test: {evaluation}" if step else f"before training: {evaluation}")
                record(step, evaluation.columns())
                progress.evaluated = step
                best_loss = math.inf if progress.best_loss is None else progress.best_loss
                if step and evaluation.loss < best_loss and has_finite_weights(bert):
                    progress.best_loss = evaluation.loss
                    if main:
                        with whole(folder / "best") as beside:
                            save_model(beside, bert, tokenizer)
        due = first < step < config.max_steps and 0 in (step % steps_per_epoch, step % config.save_every)
        hopeless = progress.skipped_in_a_row >= patience
        broken = (due or stop or finished or hopeless) and not has_finite_weights(bert)
        hopeless = hopeless or broken
        held = checkpoint and step == first  # what a resumed run began with, and nothing was trained since
        costly = not given.save_every and time.perf_counter() - saved < save_seconds / LARGEST_SAVE_SHARE
        if main and ((due and not costly) or stop or hopeless) and not (held or broken):
            began = time.perf_counter()
            checkpoint = save_checkpoint(folder, bert, tokenizer, optimizer, progress, recipe, config.keep_checkpoints)
            saved = time.perf_counter()
            save_seconds = saved - began
        if finished or stop or hopeless:
            break

        # ------------------------------------------------------------------------------------------ train
        began = time.perf_counter()
        batch, pieces = upcoming, queued
        model.train()  # an evaluation leaves it without dropout
        learning_rate = learning_rate_at(step, config)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        seeds = partial(data.noise, config.seed, DROPOUT, step)
        while (loss_sum := accumulate_gradients(accelerator, model, pieces, batch.masked_tokens, seeds)) is None:
            if ranks > 1 or micro_batch_tokens <= config.sen_max_length:  # a row holds a chunk at least
                raise UserError(
                    "micro_batch_tokens: out of memory. A lower one, or failing that a lower sen_max_length, needs less"
                )
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            micro_batch_tokens //= 2
            pieces = cut(batch.chunks, micro_batch_tokens)
            say(f"step {step + 1}: out of memory; repeated, and gone on with, in micro-batches of {micro_batch_tokens}")
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        if step + 1 < config.max_steps:  # while a GPU is still at work
            upcoming = next(steps)
            queued = cut(upcoming.chunks, micro_batch_tokens)
        told_to_stop = torch.full((), float(bool(signals)), device=device)
        over_ranks = accelerator.reduce(torch.stack([loss_sum, told_to_stop]))
        loss_sum, stop, grad_norm = torch.stack([*over_ranks, grad_norm]).tolist()  # the step's one synchronisation

        finite = math.isfinite(loss_sum) and math.isfinite(grad_norm)
        if finite:
            optimizer.step()
        elif accelerator.scaler is not None:
            accelerator.scaler.update()  # fp16: halves the scale that made the gradient overflow
        optimizer.zero_grad()
        progress.step = done = step + 1
        progress.skipped += not finite
        progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
        new = progress.unreported
        new.update(seconds=time.perf_counter() - began, steps=1)
        if finite:
            new.update(loss=loss_sum, masked_tokens=batch.masked_tokens, tokens=batch.tokens)
        else:
            say(f"step {done}: skipped, as its loss or gradient is not finite")
        bar.update()
        if (done % config.log_every == 0 or done == config.max_steps) and new["masked_tokens"]:
            figures = {"train_loss": new["loss"] / new["masked_tokens"], "lr": learning_rate}
            figures["tokens_per_s"] = new["tokens"] / new["seconds"]
            left = tqdm.format_interval(new["seconds"] / new["steps"] * (config.max_steps - done))
            line = "loss {train_loss:.3f}, perplexity {0:,.1f}, lr {lr:.2e}, {tokens_per_s:,.0f} tokens/s"
            line = line.format(perplexity(figures["train_loss"]), **figures)
            say(f"step {done}/{config.max_steps}, epoch {done / steps_per_epoch:.2f}: {line}, {left} left")
            bar.set_postfix_str(f"loss {figures['train_loss']:.3f}")
            record(done, figures)
            new.clear()
    bar.close()

    # -------------------------------------------------------------------------------------------------- finish
    completed = not (stop or hopeless)
    if main and completed:
        guesses_after = guess(bert, hidden_words, tokenizer)
        with whole(folder / "final") as beside:
            save_model(beside, bert, tokenizer)
    accelerator.wait_for_everyone()  # a launcher ends the other ranks when one has ended badly, even while it saves
    # The process group must not end inside DistributedDataParallel's reducer, which would wait for a thread of the
    # group that waits for this one: a rank would hang now and then.
    del model, optimizer
    accelerator.free_memory()
    accelerator.end_training()
    if main and completed:
        guesses = zip(hidden_words, progress.guesses_before, guesses_after, strict=True)
        say(closing_words(progress.rows[0], progress.rows[-1], found, progress.skipped, guesses, folder / "final"))
    if main and hopeless:
        lost = f"{patience} steps in a row, up to step {step}, had no finite loss and gradient"
        lost = f"the weights after step {step} are not finite" if broken else lost
        kept = [f"\n  {checkpoint} holds the last weights that are"] if checkpoint else []
        kept += [f"\n  {folder / 'best'} holds those with the lowest test loss"] if progress.best_loss else []
        raise UserError(
            f"learning_rate: {lost}; most often {config.learning_rate:g} is too high. Begin a new run with a lower one"
            + "".join(kept)
        )
    if stop:
        say(f"stopped after step {step}, which {checkpoint} holds. The same command with --resume goes on from there")
    if not completed:
        sys.exit(2 if hopeless else 128 + (signals or [signal.SIGTERM])[0])


def decide_on_main(accelerator: Accelerator, decide: Callable[[], Any]) -> Any:
    """What `decide` returns on the main rank, on every rank. Where it raises UserError there, the others just exit."""
    decided = error = None
    if accelerator.is_main_process:
        try:
            decided = decide()
        except UserError as raised:
            error = raised
    decided, failed = broadcast_object_list([decided, error is not None])
    if error:
        raise error
    if failed:
        sys.exit(2)
    return decided


def catch_signals(speak: bool) -> list[int]:
    """Turns Ctrl-C and SIGTERM from now on into entries of the list that it returns. A second Ctrl-C exits at once.

    A second SIGTERM does not: launchers and schedulers each send one to every rank.
    """
    received = []

    def note(number, frame):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if number == signal.SIGINT:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if speak and not received:  # by os.write, as a print cannot interrupt a print
            os.write(2, b"\nfinishing the step and saving; a second Ctrl-C exits at once\n")
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return received


MicroBatch = tuple[dict[str, Any], torch.Tensor]  # the model's inputs and its targets


def micro_batches(
    chunks: data.MaskedChunks, tokens: int, vocabulary: Vocabulary, device: torch.device, varlen: bool = False
) -> list[MicroBatch]:
    """Cuts the chunks into micro-batches of at most `tokens` tokens, or one row, on the device.

    The targets (masked,) are the tokens to predict, at the inputs' `masked` positions of the flattened rows. With
    `varlen` a micro-batch is one row without padding, for variable-length attention; without, it is packed rows.
    """
    parts = []
    if varlen and len(chunks.lengths):
        for part in data.split(chunks, tokens):
            arrays = {"input_ids": part.input_ids[None], "position_ids": part.position_ids[None]}
            arrays["starts"] = data.chunk_bounds(part.lengths).astype(np.int32)
            arrays |= {"masked": part.masked, "targets": part.targets}
            parts.append((arrays, {"longest": int(part.lengths.max())}))
    else:
        rows = data.pack(chunks, min(ROW_TOKENS, tokens), vocabulary)
        parts = [(part._asdict(), {}) for part in data.split_rows(rows, tokens)]

    cut = []
    for arrays, numbers in parts:
        tensors = {name: _to_device(array, device) for name, array in arrays.items()}
        targets = tensors.pop("targets")
        cut.append((tensors | numbers, targets))
    return cut


def _to_device(array, device):
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def accumulate_gradients(
    accelerator: Accelerator,
    model: torch.nn.Module,
    pieces: list[MicroBatch],
    masked_tokens: int,
    seeds: Callable[..., np.ndarray],
) -> torch.Tensor | None:
    """Adds the gradient of the step's mean loss, over `masked_tokens` on all ranks; the summed loss of this rank.

    None where memory runs out. Dropout is seeded by `seeds` of the micro-batch and the rank.
    """
    loss_sum = torch.zeros((), device=accelerator.device)
    try:
        for number, (inputs, targets) in enumerate(pieces):
            torch.manual_seed(int(seeds(number, accelerator.process_index)[0]))
            last = number == len(pieces) - 1
            with nullcontext() if last else accelerator.no_sync(model):
                loss = F.cross_entropy(model(**inputs).float(), targets, reduction="sum")
                # DistributedDataParallel divides by the ranks
                accelerator.backward(loss * accelerator.num_processes / masked_tokens)
            loss_sum += loss.detach()
    except torch.OutOfMemoryError:
        return None
    return loss_sum


def fit_memory(
    accelerator: Accelerator,
    model: torch.nn.Module,
    cut: Callable[..., list[MicroBatch]],
    vocabulary: Vocabulary,
    config: Config,
) -> int:
    """The tokens of the largest micro-batch, at most a step's, that every rank has the memory to train on.

    Found by trying, beside the room that AdamW will take, with more masked tokens than chance will bring.
    """
    model = accelerator.unwrap_model(model).train()  # a rank that runs out of memory must not leave others waiting
    averages = [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(2)]
    body = config.sen_max_length - 2  # without [CLS] and [SEP]
    most = math.ceil(config.batch_size / accelerator.num_processes)
    number = max(1, min(most, LARGEST_MICRO_BATCH_TOKENS // config.sen_max_length))
    while True:
        ids = np.full(number * body, vocabulary.mask_id)
        masked = np.arange(0, len(ids), 4)
        chunks = data.frame(ids, masked, ids[masked], np.full(number, body), vocabulary)
        pieces = cut(chunks, number * config.sen_max_length)
        fits = accumulate_gradients(accelerator, model, pieces, len(ids), partial(data.noise, DROPOUT)) is not None
        model.zero_grad()
        torch.cuda.empty_cache()
        if fits or number == 1:
            break
        number //= 2
    del averages
    fitting = torch.tensor([number * config.sen_max_length], device=accelerator.device)
    return int(accelerator.gather(fitting).min())


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    chunks: data.Chunks,
    vocabulary: Vocabulary,
    cut: Callable[[data.MaskedChunks], list[MicroBatch]],
    signals: list[int],
) -> tuple[Evaluation, bool]:
    """Loss and accuracy on every chunk once, over all devices, always with BERT's own masking and fixed masks.

    Gives up once `signals` of any rank holds one; the second value says so, and the first is then worth nothing.
    """
    model = accelerator.unwrap_model(model).eval()
    exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
    totals = torch.zeros(3, dtype=exact, device=accelerator.device)  # summed loss, right guesses, masked tokens
    mine = np.arange(accelerator.process_index, chunks.number, accelerator.num_processes)
    for start in range(0, len(mine), EVALUATION_CHUNKS):
        if signals:
            break
        some = data.evaluation_chunks(chunks, mine[start : start + EVALUATION_CHUNKS], vocabulary)
        for inputs, targets in cut(some):
            logits = model(**inputs).float()  # (masked, vocabulary)
            right = (logits.argmax(-1) == targets).sum()
            masked = torch.full_like(right, len(targets))
            totals += torch.stack([F.cross_entropy(logits, targets, reduction="sum"), right, masked])
    totals = torch.cat([totals, torch.full_like(totals[:1], bool(signals))])
    loss_sum, right, masked, stop = accelerator.reduce(totals).tolist()
    masked = max(masked, 1)  # a signal may come before the first
    return Evaluation(loss_sum / masked, right / masked, int(masked)), bool(stop)


def learning_rate_at(step: int, config: Config) -> float:
    """Linear warm-up to `learning_rate`, then linear decay; the first step trains already, the last one still does."""
    warmup, total = int(config.num_warmup_steps), config.max_steps
    share = (step + 1) / warmup if step < warmup else (total - step) / max(1, total - warmup)
    return config.learning_rate * share


def resolve(config: Config, steps_per_epoch: int, precision: str) -> Config:
    """Replaces every setting that stands for another value by that value; raises UserError where they do not fit."""
    total_steps = config.max_steps or config.num_epochs * steps_per_epoch
    share = config.num_warmup_steps
    warmup_steps = round(share * total_steps) if share < 1 else share
    if warmup_steps > total_steps:
        raise UserError(f"num_warmup_steps: {warmup_steps:g} is more than the {total_steps} steps of num_epochs")
    usual = SCRATCH_SIZES[config.scratch_size][2] if config.scratch_size else 3e-5
    return replace(
        config,
        max_steps=total_steps,
        num_warmup_steps=warmup_steps,
        learning_rate=config.learning_rate or usual,
        eval_every=config.eval_every or steps_per_epoch,
        save_every=config.save_every or steps_per_epoch,
        micro_batch_tokens=config.micro_batch_tokens or (None if count_gpus() else CPU_MICRO_BATCH_TOKENS),
        mixed_precision=precision,
    )


@contextmanager
def run_folder(config: Config, accelerator: Accelerator) -> Iterator[Path]:
    """The run's own folder, made or, to resume a run, found; one made is removed if the run ends before its first step.

    Raises UserError where `run_name` is taken, another process is at work there or the folder cannot be made.
    """
    made = False
    with ExitStack() as held:

        def claim():
            nonlocal made
            folder = find_run(config) if config.resume else name_run(config)
            if config.check_only:
                return folder
            try:
                held.enter_context(lock(folder.parent / ".cache" / f"{folder.name}.lock", timeout_s=0))
                if not folder.exists():
                    with whole(folder) as beside:
                        beside.mkdir()
                        write_json(beside / "settings.json", {"settings": asdict(config)})  # by which it is a run's
                    made = True
            except Timeout:
                raise UserError(f"run_name: another process is at work in {folder}") from None
            except OSError as error:
                raise UserError(f"path_model_save: cannot make {folder}: {error.strerror}") from None
            return folder

        folder = decide_on_main(accelerator, claim)
        try:
            yield folder
        finally:
            if made and not (folder / "metrics.csv").exists():
                shutil.rmtree(folder)


def name_run(config: Config) -> Path:
    """The folder of a new run: `run_name`, or date, time and model, numbered where two begin in one second.

    Raises UserError where `run_name` is taken.
    """
    model = "demo" if config.demo else re.sub(r"[^\w.-]+", "-", Path(config.initial_pretrain_model).name)
    name = config.run_name or time.strftime(f"%Y-%m-%d_%H-%M-%S_{model}")
    folder, number = Path(config.path_model_save) / name, 1
    if config.run_name and folder.exists():
        raise UserError(f"run_name: {folder} exists already; choose another name, or go on with it by --resume")
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{name}-{number}")
    return folder


def main(config: Config) -> None:
    """Sets up the devices, the tracker and the run's folder, and trains. Raises UserError; SystemExit on a signal."""
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line at once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    transformers.logging.set_verbosity_error()  # what it would warn of is said by load_model
    transformers.logging.disable_progress_bar()
    filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)  # accelerate passes it on by its old name
    tracker = None if config.tracker == "none" else config.tracker
    if tracker and tracker not in map(str, get_available_trackers()):
        raise UserError(f"tracker: {tracker} is not installed, or not one that accelerate knows")
    check_devices(config)
    options = [
        InitProcessGroupKwargs(timeout=timedelta(days=1)),  # one machine may prepare its text longer than another
        DistributedDataParallelKwargs(broadcast_buffers=False),  # BERT's never change
    ]
    precision = choose_precision(config)
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=tracker,
            project_dir=config.path_model_save,
            kwargs_handlers=options,
        )
        if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
            raise UserError(
                "the launcher started several processes, and there is no GPU for them; to train on the CPU in several "
                "processes set ACCELERATE_USE_CPU=true"
            )
        with run_folder(config, accelerator) as folder:
            accelerator.project_configuration.logging_dir = str(folder / "tensorboard")
            train(config, accelerator, folder)
    except KeyboardInterrupt:
        print("\nstopped; nothing was trained yet that could be lost", file=sys.stderr)
        sys.exit(130)
    except SafetensorError as error:  # which is no OSError
        raise UserError(f"path_model_save: cannot write to {folder}: {error}") from None
    except torch.OutOfMemoryError as error:
        raise UserError(f"micro_batch_tokens, sen_max_length: out of memory; lower ones need less. {error}") from None
    except RuntimeError as error:
        if config.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            reason = " ".join(f"{error}".splitlines()[:2])
            raise UserError(f"compile: the model cannot be compiled here; leave it out. {reason}") from None
        if not (isinstance(error, DistBackendError) or "gloo" in str(error)):
            raise
        print(
            f"error: rank {accelerator.process_index} lost touch with another rank, which may have said why above. "
            f"The same command with --resume goes on from the newest checkpoint in {config.path_model_save}",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    with plain_errors():
        main(settings)
