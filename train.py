"""Continue a BERT's masked-language-model pre-training on your own text: prepare, baseline, train, evaluate, save."""

import signal

from Config import SCRATCH_SIZES, Config, UserError, describe, parse_flags, plain_errors
from hub import locate_downloads
from machine import check_devices, choose_devices, choose_precision, hints, micro_batch_tokens

if __name__ == "__main__":  # before the imports that take seconds: help, wrong settings and a missing Hub are quick
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in an import is no traceback
    with plain_errors():
        settings = parse_flags()
        choose_devices(settings)
        locate_downloads(settings)

import math
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

import data_process as data
from demo import write_corpus
from model import PackedMaskedLM, load_model, save_model
from report import Evaluation, closing_words, guess, hide_words, perplexity, write_json, write_metrics
from text import find_text
from vocabulary import Vocabulary, load_tokenizer, read_vocabulary

ROW_TOKENS = 256  # chunks are packed into rows of this length, or of the longest chunk
EVALUATION_CHUNKS = 256  # chunks packed together in an evaluation
DROPOUT = 3  # a stream of random numbers; data_process has the others
HOPELESS_STEPS = 5  # steps in a row without a finite loss and gradient that end a run
FP16_HALVINGS = 16  # so many more where a scaler may first have to halve its 65,536 down to 1
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "numpy")


def train(config: Config, accelerator: Accelerator, folder: Path) -> None:
    """The whole job, under `folder`: prepare, evaluate the start, train, evaluate, save, finish.

    Raises UserError for whatever the user can put right.
    """
    # ------------------------------------------------------------------------------------------------- prepare
    main, device = accelerator.is_main_process, accelerator.device
    say = tqdm.write if main else lambda text: None  # a print would tear the progress bar
    rank, ranks = accelerator.process_index, accelerator.num_processes
    if config.demo:
        config = replace(config, path_datasets=str(folder / "data"))
    with accelerator.main_process_first():  # the others find the text tokenized
        if config.demo and main:
            write_corpus(Path(config.path_datasets))
        text = find_text(config)
        tokenizer = load_tokenizer(config, text.train, text.digest)
        vocabulary = read_vocabulary(tokenizer)
        chunks, test_chunks, found = data.prepare(config, text, tokenizer, vocabulary)
    bert, warnings = load_model(config, vocabulary.size, vocabulary.pad_id)
    steps_per_epoch = math.ceil(chunks.number / config.batch_size)
    config = resolve(config, steps_per_epoch, accelerator.mixed_precision)
    derived = {
        "devices": f"{ranks} x {device.type}",
        "parameters": sum(parameter.numel() for parameter in bert.parameters()),
        "chunks": chunks.number,
        "steps_per_epoch": steps_per_epoch,
        "tokens_per_step": round(len(chunks.tokens) / steps_per_epoch),
    }
    say(f"settings (* differs from Config.py's default)\n{describe(config)}\n")
    say(f"text\n{data.describe_text(found, config.initial_pretrain_tokenizer)}\n")
    say("derived\n" + "".join(f"   {name:<26}  {value}\n" for name, value in derived.items()))
    for line in warnings + hints(ranks, derived["tokens_per_step"]):
        say(line)
    if config.check_only:
        return say("Settings and text are in order.")

    model = PackedMaskedLM(bert)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, others = ([p for p in trained if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups, lr=config.learning_rate, fused=True))
    rule = data.MaskRule(
        config.mlm_probability, config.mask_replace_prob, config.random_replace_prob, config.whole_words_mask
    )

    # ------------------------------------------------------------------------------------------------ baseline
    hidden_words = hide_words(islice(text.test(), 2000), tokenizer) if main else []
    guesses_before = guess(bert, hidden_words, tokenizer)
    before = evaluate(accelerator, model, test_chunks, vocabulary, config)
    say(f"before training: {before}")
    rows = [{"step": 0, "epoch": 0, **before.columns()}]
    if main:
        versions = {name: version(name) for name in PACKAGES}
        write_json(folder / "settings.json", {"settings": asdict(config), "derived": derived, "versions": versions})
        write_metrics(folder / "metrics.csv", rows)
    if accelerator.log_with:
        accelerator.init_trackers("Pretrain_Bert_with_MaskLM")
        accelerator.log(before.columns(), step=0)

    # --------------------------------------------------------------------------------------------------- train
    best_loss, skipped_in_a_row, logged = math.inf, 0, 0
    patience = HOPELESS_STEPS + (FP16_HALVINGS if accelerator.scaler is not None else 0)
    seen, since = np.zeros(3), time.perf_counter()  # loss sum, masked tokens and tokens since the last log line
    bar = tqdm(total=config.max_steps, unit="step", disable=not (main and sys.stderr.isatty()))
    for step in range(config.max_steps):
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0:
            order = data.epoch_order(config.seed, epoch, chunks.number)  # (chunks,)
        indices = order[place * config.batch_size : (place + 1) * config.batch_size]  # (n,), n <= batch_size
        batch, masked_tokens = data.masked_batch(
            chunks, indices, vocabulary, ROW_TOKENS, rule, draw=(config.seed, epoch), part=slice(rank, None, ranks)
        )

        model.train()  # an evaluation leaves it without dropout
        learning_rate = learning_rate_at(step, config)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        loss_sum = torch.zeros((), device=device)
        micro_batches = list(split(batch, config.micro_batch_tokens, device))
        for number, (inputs, targets) in enumerate(micro_batches):
            torch.manual_seed(int(data.noise(config.seed, DROPOUT, step, number, rank)[0]))
            last = number == len(micro_batches) - 1
            with nullcontext() if last else accelerator.no_sync(model):
                micro_loss = F.cross_entropy(model(**inputs).float(), targets, reduction="sum")
                accelerator.backward(micro_loss * ranks / masked_tokens)  # DistributedDataParallel divides by ranks
            loss_sum += micro_loss.detach()
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        loss_sum, grad_norm = torch.stack([accelerator.reduce(loss_sum), grad_norm]).tolist()  # the one synchronisation

        finite = math.isfinite(loss_sum) and math.isfinite(grad_norm)
        if finite:
            optimizer.step()
        elif accelerator.scaler is not None:
            accelerator.scaler.update()  # fp16: halves the scale that made the gradient overflow
        optimizer.zero_grad()
        done, skipped_in_a_row = step + 1, 0 if finite else skipped_in_a_row + 1
        if finite:
            seen += loss_sum, masked_tokens, chunks.lengths(indices).sum()
        else:
            say(f"step {done}: skipped, as its loss or gradient is not finite")
        if skipped_in_a_row == patience:
            if main:
                save_model(folder / "last", bert, tokenizer)
            raise UserError(
                f"learning_rate: {patience} steps in a row, up to step {done}, had no finite loss and gradient; most "
                f"often {config.learning_rate:g} is too high. The weights before them are in {folder / 'last'}"
            )

        # ----------------------------------------------------------------------------- log, evaluate, save
        row, finished, now = {}, done == config.max_steps, time.perf_counter()
        bar.update()
        if (done % config.log_every == 0 or finished) and seen[1]:
            row = {"train_loss": seen[0] / seen[1], "lr": learning_rate, "tokens_per_s": seen[2] / (now - since)}
            left = tqdm.format_interval((now - since) / (done - logged) * (config.max_steps - done))
            line = "loss {train_loss:.3f}, perplexity {0:,.1f}, lr {lr:.2e}, {tokens_per_s:,.0f} tokens/s"
            line = line.format(perplexity(row["train_loss"]), **row)
            say(f"step {done}/{config.max_steps}, epoch {done / steps_per_epoch:.2f}: {line}, {left} left")
            bar.set_postfix_str(line)
            seen, since, logged = np.zeros(3), now, done
        if done % config.eval_every == 0 or finished:
            evaluation = evaluate(accelerator, model, test_chunks, vocabulary, config)
            row |= evaluation.columns()
            say(f"step {done}/{config.max_steps}, test: {evaluation}")
            if main and evaluation.loss < best_loss:
                save_model(folder / "best", bert, tokenizer)
            best_loss = min(best_loss, evaluation.loss)
        if main and done % config.save_every == 0 and not finished:
            save_model(folder / "last", bert, tokenizer)
        if row:
            rows.append({"step": done, "epoch": done / steps_per_epoch, **row})
            accelerator.log(row, step=done)
            if main:
                write_metrics(folder / "metrics.csv", rows)
        since += time.perf_counter() - now  # evaluating and saving is no training time
    bar.close()

    # -------------------------------------------------------------------------------------------------- finish
    guesses_after = guess(bert, hidden_words, tokenizer)
    if main:
        save_model(folder / "final", bert, tokenizer)
        shutil.rmtree(folder / "last", ignore_errors=True)  # final/ is newer
    # The process group must not end inside DistributedDataParallel's reducer, which would wait for a thread of the
    # group that waits for this one: a rank would hang now and then.
    del model, optimizer
    accelerator.free_memory()
    accelerator.end_training()
    guesses = zip(hidden_words, guesses_before, guesses_after, strict=True)
    say(closing_words(before, evaluation, found, guesses, folder / "final"))


def split(batch: data.Batch, micro_batch_tokens: int, device: torch.device) -> Iterator[tuple[dict, torch.Tensor]]:
    """Cuts packed rows into micro-batches of at most so many tokens, or one row: the model's inputs and its targets.

    The targets (masked,) are the tokens to predict, at the inputs' `masked` positions of the flattened rows.
    """
    rows, width = batch.labels.shape
    rows_each = max(1, micro_batch_tokens // width)
    for start in range(0, rows, rows_each):
        input_ids, position_ids, sequence_ids, labels = (array[start : start + rows_each] for array in batch)
        masked = np.flatnonzero(labels != data.IGNORED)
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "sequence_ids": sequence_ids, "masked": masked}
        tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
        yield tensors, torch.from_numpy(labels.reshape(-1)[masked]).to(device)


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    chunks: data.Chunks,
    vocabulary: Vocabulary,
    config: Config,
) -> Evaluation:
    """Loss and accuracy on every chunk once, over all devices, always with BERT's own masking and fixed masks."""
    model = accelerator.unwrap_model(model).eval()
    totals = np.zeros(3)  # summed loss, right guesses, masked tokens
    mine = np.arange(accelerator.process_index, chunks.number, accelerator.num_processes)
    for start in range(0, len(mine), EVALUATION_CHUNKS):
        batch, _ = data.masked_batch(chunks, mine[start : start + EVALUATION_CHUNKS], vocabulary, ROW_TOKENS)
        for inputs, targets in split(batch, config.micro_batch_tokens, accelerator.device):
            logits = model(**inputs).float()  # (masked, vocabulary)
            right = (logits.argmax(-1) == targets).sum()
            totals += F.cross_entropy(logits, targets, reduction="sum").item(), right.item(), len(targets)
    exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
    totals = torch.tensor(totals, dtype=exact, device=accelerator.device)
    loss_sum, right, masked = accelerator.reduce(totals).tolist()
    return Evaluation(loss_sum / masked, right / masked, int(masked))


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
        micro_batch_tokens=config.micro_batch_tokens or micro_batch_tokens(),
        mixed_precision=precision,
    )


@contextmanager
def run_folder(config: Config, accelerator: Accelerator) -> Iterator[Path]:
    """Makes the run's own folder, and removes it again if the run ends before it has measured anything.

    Raises UserError where `run_name` is taken or the folder cannot be made.
    """
    model = "demo" if config.demo else re.sub(r"[^\w.-]+", "-", Path(config.initial_pretrain_model).name)
    name = config.run_name or time.strftime(f"%Y-%m-%d_%H-%M-%S_{model}")
    folder = Path(config.path_model_save) / name
    if accelerator.is_main_process:
        taken = 1
        while folder.exists() and not config.run_name:  # two runs in one second
            taken += 1
            folder = folder.with_name(f"{name}-{taken}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise UserError(f"run_name: {folder} exists already; choose another name, or remove it") from None
        except OSError as error:
            raise UserError(f"path_model_save: cannot make {folder}: {error.strerror}") from None
    folder = broadcast_object_list([folder])[0]
    try:
        yield folder
    finally:
        if accelerator.is_main_process and not (folder / "metrics.csv").exists():
            shutil.rmtree(folder)


def main(config: Config) -> None:
    """Sets up the devices, the tracker and the run's folder, and trains. Raises UserError."""
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line at once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    transformers.logging.set_verbosity_error()  # what it would warn of is said by load_model
    transformers.logging.disable_progress_bar()
    tracker = None if config.tracker == "none" else config.tracker
    if tracker and tracker not in map(str, get_available_trackers()):
        raise UserError(f"tracker: {tracker} is not installed, or not one that accelerate knows")
    check_devices(config)
    precision = choose_precision(config)
    accelerator = Accelerator(mixed_precision=precision, log_with=tracker, project_dir=config.path_model_save)
    with run_folder(config, accelerator) as folder:
        accelerator.project_configuration.logging_dir = str(folder / "tensorboard")
        try:
            train(config, accelerator, folder)
        except KeyboardInterrupt:
            print(f"\nstopped; what has been saved in {folder} is whole", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    with plain_errors():
        main(settings)
