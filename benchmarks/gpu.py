"""Correctness, then speed, on one GPU or two: one command for whoever has a card. It ends in a table for RESULTS.md.

    python benchmarks/gpu.py            # on a GPU, within 10 minutes
    python benchmarks/gpu.py --quick    # small models and few steps; on a CPU too, with fewer rows

Text is random tokens, so nothing is downloaded. What needs a package that is missing, or a GPU, is left out by name.
The exit status is 1 where something is wrong.
"""

import argparse
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.profiler import profile
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from Config import SCRATCH_SIZES, Config
from data_process import training_batches
from mlm.data.chunks import Chunks, steps_per_epoch
from mlm.data.masking import BERT_RULE
from mlm.data.micro_batches import MicroBatcher, Prefetcher
from mlm.data.tokenizer import Vocabulary
from mlm.encoder.attention import has_variable_lengths
from mlm.encoder.packed import PackedMaskedLM
from mlm.runtime.hardware import has_variable_length_kernels, native_precision
from mlm.runtime.signals import StopRequest
from mlm.training import micro_batch_size
from mlm.training.optimizer import make_optimizer
from mlm.training.plan import Plan
from mlm.training.progress import Progress
from mlm.training.run import Learner
from mlm.training.step import take_step

ROOT = Path(__file__).parent.parent
VOCABULARY_SIZE = 30_522
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MISSING = [name for name in ("datasets", "pyarrow", "rjieba", "tyro") if not importlib.util.find_spec(name)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEVER = np.zeros(VOCABULARY_SIZE, dtype=bool)
VOCABULARY = Vocabulary(
    cls_id=101, sep_id=102, pad_id=0, unk_id=100, mask_id=103, separators=1,
    regular_ids=np.arange(999, VOCABULARY_SIZE), begins_word=~NEVER, ends_word=NEVER, is_blank=NEVER,
)  # fmt: skip


# --------------------------------------------------------------------------------------------- what is trained on what


def random_chunks(length: int, number: int) -> Chunks:
    """Chunks of half to one and a half times so many random tokens, at most 510."""
    draw = np.random.default_rng(length)
    lengths = draw.integers(length // 2, min(510, length * 3 // 2) + 1, number)
    tokens = draw.integers(1000, VOCABULARY_SIZE, lengths.sum(), dtype=np.uint16)
    return Chunks(tokens, np.concatenate([[0], np.cumsum(lengths)]), np.arange(number, dtype=np.uint64))


def random_bert(size: str, dropout: float = 0.0) -> BertForMaskedLM:
    torch.manual_seed(0)
    layers, hidden, _ = SCRATCH_SIZES[size]
    shape = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": hidden // 64}
    shape |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY_SIZE, intermediate_size=4 * hidden, **shape))


def random_encoder(family: str) -> PreTrainedModel:
    """A small model of a family, of one head size: RoBERTa's positions begin at 2; two of three layers of ModernBERT
    have a window, here of 17 positions, so that lines are longer."""
    if family == "bert":
        return random_bert("mini")
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}
    shape |= {"vocab_size": VOCABULARY_SIZE, "pad_token_id": 1}
    if family == "roberta":
        shape |= {"max_position_embeddings": 514, "type_vocab_size": 1}
        return RobertaForMaskedLM(RobertaConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    return ModernBertForMaskedLM(ModernBertConfig(**shape, local_attention=16))


def settings(batch_size: int, **changes) -> Config:
    usual = {
        "batch_size": batch_size,
        "sen_max_length": 512,
        "max_steps": 10_000,
        "learning_rate": 1e-4,
        "mlm_probability": 0.15,
        "weight_decay": 0.01,
        "optimizer": "adamw",
    }
    return Config(**usual | changes)


def make_learner(size: str, config: Config, precision: str, on_cpu: bool = False) -> Learner:
    """What train.py has learn, with micro-batches as large as fit."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu)
    bert = random_bert(size)
    packed = PackedMaskedLM(bert)
    if config.compile:
        packed.compile(dynamic=True)
    model, optimizer = accelerator.prepare(
        packed, make_optimizer(packed, config.optimizer, config.learning_rate, config.weight_decay, precision)
    )
    varlen = not on_cpu and has_variable_length_kernels(config.attention_dropout, precision, head_size=64)
    micro_batcher = MicroBatcher(VOCABULARY, accelerator.device, varlen, config.sen_max_length, 1 << 20)
    learner = Learner(accelerator, bert, model, optimizer, micro_batcher)
    micro_batcher.max_positions = micro_batch_size.choose(learner, config, found=None)
    return learner


def train_steps(learner: Learner, chunks: Chunks, config: Config) -> Iterator[float]:
    """Trains a step at a time; its mean loss."""
    epoch_steps, positions = steps_per_epoch(len(chunks), config.batch_size), len(chunks.tokens)
    plan = Plan(
        steps=config.max_steps, steps_per_epoch=epoch_steps, warmup_steps=1000, decay_from=1000,
        peak_learning_rate=config.learning_rate, evaluate_every=epoch_steps, save_every=None,
        first_test_chunks=1, test_chunks=1,
        tokens_per_step=positions // epoch_steps, positions_per_step=positions // epoch_steps,
    )  # fmt: skip
    progress, stop = Progress(), StopRequest()
    batches = training_batches(chunks, VOCABULARY, BERT_RULE, 0, config.batch_size)
    prefetched = Prefetcher(batches, learner.micro_batcher)
    prefetched.over_ranks = prefetched.counts
    while True:
        before = replace(progress.since_last_log)
        take_step(learner, progress, prefetched, plan, config, stop)
        new = progress.since_last_log
        yield (new.loss - before.loss) / max(1, new.masked_tokens - before.masked_tokens)


# ---------------------------------------------------------------------------------------------------------- correctness


def loss_and_gradient(family: str, chunks: int, precision: str, varlen: bool | None) -> tuple[float, torch.Tensor]:
    """Of one batch of so many chunks: by the stock model on padded lines where `varlen` is None, else packed, by mask
    or by kernels."""
    bert = random_encoder(family).to(DEVICE)
    batch = next(training_batches(random_chunks(25, chunks), VOCABULARY, BERT_RULE, 0, chunks))
    with torch.autocast(DEVICE.type, DTYPES[precision], enabled=precision != "no"):
        if varlen is None:
            loss = padded_loss(bert, batch) / len(batch.targets)
        else:
            model = PackedMaskedLM(bert)
            parts = MicroBatcher(VOCABULARY, DEVICE, varlen, 512, 1 << 20)(batch)
            losses = [F.cross_entropy(model(**part.inputs).float(), part.targets, reduction="sum") for part in parts]
            loss = torch.stack(losses).sum() / len(batch.targets)
    loss.backward()
    gradients = [p.grad.flatten() for p in bert.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients).double()


def backward_fills_no_zeros(precision: str) -> str:
    """Counts, in the operations of a step with variable-length attention, what a plainer way of writing it would add:
    tensors of zeros for one row of the attention's input, and a row of token types for every token."""
    model = PackedMaskedLM(random_bert("mini")).to(DEVICE)
    batch = next(training_batches(random_chunks(25, 64), VOCABULARY, BERT_RULE, 0, 64))
    [micro_batch] = MicroBatcher(VOCABULARY, DEVICE, True, 512, 1 << 20)(batch)
    with profile(record_shapes=True) as profiled, torch.autocast(DEVICE.type, DTYPES[precision]):
        model(**micro_batch.inputs).sum().backward()
    operations = [(event.key, event.input_shapes) for event in profiled.events()]
    assert "aten::select_backward" not in {name for name, _ in operations}
    rows = [shapes[1] for name, shapes in operations if name == "aten::embedding_dense_backward"]
    positions = len(batch.input_ids)
    assert sorted(rows) == [[1, 1], [1, positions], [1, positions]], rows  # token types, words, positions
    return "none, and one row of token types"


def padded_loss(bert: PreTrainedModel, chunks) -> torch.Tensor:
    """The summed loss of the stock model, one chunk a row."""
    width, ends = int(chunks.lengths.max()), np.cumsum(chunks.lengths)
    labels = np.full(len(chunks.input_ids), -100)
    labels[chunks.label_positions] = chunks.targets
    ids, attention, wanted = (torch.zeros(len(ends), width, dtype=torch.long) for _ in range(3))
    wanted -= 100
    for row, (end, length) in enumerate(zip(ends, chunks.lengths, strict=True)):
        ids[row, :length] = torch.from_numpy(chunks.input_ids[end - length : end])
        wanted[row, :length] = torch.from_numpy(labels[end - length : end])
        attention[row, :length] = 1
    logits = bert(input_ids=ids.to(DEVICE), attention_mask=attention.to(DEVICE)).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten().to(DEVICE), reduction="sum")


def packed_is_stock(family: str, chunks: int, precision: str, varlen: bool) -> str:
    """The packed loss and gradient are as near to the stock model's in float32 as the stock model is in this format."""
    exact_loss, exact = loss_and_gradient(family, chunks, "no", None)
    stock_loss, stock = loss_and_gradient(family, chunks, precision, None)
    loss, gradient = loss_and_gradient(family, chunks, precision, varlen)

    def distance(other: torch.Tensor) -> float:
        return ((other - exact).norm() / exact.norm()).item()

    assert abs(loss - exact_loss) <= 2 * abs(stock_loss - exact_loss) + 1e-3, (loss, stock_loss, exact_loss)
    assert distance(gradient) <= 2 * distance(stock) + 1e-4, (distance(gradient), distance(stock))
    return (
        f"loss off by {abs(loss - exact_loss):.1e}, gradient by {distance(gradient):.1e} (stock {distance(stock):.1e})"
    )


def memory_trial_and_out_of_memory() -> str:
    """With little memory: the size that the trial finds trains, and one too large is halved until it fits."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 3 * 2**30 / total))
    spare, micro_batch_size.SPARE_SHARE = micro_batch_size.SPARE_SHARE, 0.07 * min(1.0, 3 * 2**30 / total)
    try:
        chunks = random_chunks(300, 4096)
        config = settings(512)
        learner = make_learner("mini", config, native_precision())
        found, too_large = learner.micro_batcher.max_positions, 512 * 512
        next(train_steps(learner, chunks, config))
        learner.micro_batcher.max_positions = too_large
        next(train_steps(learner, chunks, config))
        halved = learner.micro_batcher.max_positions
        assert halved < too_large, "it never ran out of memory"
        assert halved / 4 <= found <= halved, f"the trial finds {found:,} positions, halving {halved:,}"
    finally:
        micro_batch_size.SPARE_SHARE = spare
        torch.cuda.set_per_process_memory_fraction(1.0)
    return f"in 3 GiB the trial finds {found:,} positions; {too_large:,} were halved to {halved:,}"


def one_device_is_the_other(steps: int) -> str:
    """The losses of the first steps, in float32, on the GPU and on the CPU."""
    chunks = random_chunks(25, 4096)
    losses = []
    for on_cpu in (False, True):
        config = settings(64, learning_rate=1e-3)
        stream = train_steps(make_learner("mini", config, "no", on_cpu), chunks, config)
        losses.append([next(stream) for _ in range(steps)])
    gap = max(abs(one - other) / other for one, other in zip(*losses, strict=True))
    assert gap < 1e-3 and losses[0][-1] < losses[0][0], (gap, losses[0][0], losses[0][-1])
    return f"{steps} losses, from {losses[0][0]:.3f} to {losses[0][-1]:.3f}, differ by at most {gap:.1e} of each"


def write_text(folder: Path) -> None:
    (folder / "text").mkdir()
    draw = np.random.default_rng(0)
    for split, lines in (("train", 600), ("test", 40)):
        text = "\n".join(" ".join(f"w{word}" for word in draw.integers(0, 500, 20)) for _ in range(lines))
        (folder / "text" / f"{split}.txt").write_text(text)


def whole_run(folder: Path, name: str, steps: int, ranks: int = 1, stop_after: int = 0, **changes) -> dict:
    """The weights that `train.py` ends with, as a user would start it; stopped after a step and resumed where asked."""
    from safetensors.torch import load_file

    config = Config(
        initial_pretrain_model="scratch:tiny", initial_pretrain_tokenizer="corpus", vocab_size=1000, tracker="none",
        path_datasets=str(folder / "text"), path_model_save=str(folder / "output"), run_name=name, log_every=1,
        max_steps=steps, mixed_precision="no", **changes,
    )  # fmt: skip
    flags = [f"--{key}={value}" for key, value in asdict(config).items() if value not in (None, False, "")]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "train.py", *flags]
    if stop_after:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith(f"step {stop_after}/"):
                process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM, process.returncode
        command.append("--resume")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return load_file(folder / "output" / name / "final" / "model.safetensors")


def furthest(one: dict, other: dict) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def resumed_is_uninterrupted(steps: int) -> str:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as both:
        write_text(Path(folder))
        whole = both.submit(whole_run, Path(folder), "whole", steps)
        resumed = both.submit(whole_run, Path(folder), "resumed", steps, stop_after=steps // 3)
        gap = furthest(whole.result(), resumed.result())
    assert gap <= (0 if DEVICE.type == "cpu" else 1e-4), gap
    return "the same bits" if gap == 0 else f"weights differ by at most {gap:.1e}"


def two_gpus_are_one(steps: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder))
        one = whole_run(Path(folder), "one", steps, hidden_dropout=0.0)
        two = whole_run(Path(folder), "two", steps, ranks=2, hidden_dropout=0.0)
    gap = furthest(one, two)
    assert gap <= 1e-4, gap
    return f"weights differ by at most {gap:.1e}"


# ---------------------------------------------------------------------------------------------------------------- speed


def measure(step: Callable[[], object], warm_up: int, seconds: float, most: int) -> tuple[int, float]:
    """Steps and seconds after the warm-up, until so many seconds or steps are over."""
    for _ in range(warm_up):
        step()
    synchronise()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # without the trial of this project's
    began, done = time.perf_counter(), 0
    while done < most and (done < 3 or time.perf_counter() - began < seconds):
        step()
        done += 1
    synchronise()
    return done, time.perf_counter() - began


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def ours(
    size: str, chunks: Chunks, batch_size: int, precision: str, compiled: bool, seconds: float, most: int
) -> float:
    """Tokens a second of this project's step."""
    config = settings(batch_size, compile=compiled)
    stream = train_steps(make_learner(size, config, precision), chunks, config)
    done, elapsed = measure(lambda: next(stream), 5, seconds, most)
    return done * batch_size * len(chunks.tokens) / len(chunks) / elapsed


def trainer(size: str, chunks: Chunks, batch_size: int, precision: str, seconds: float, most: int) -> float:
    """Tokens a second of transformers.Trainer with its collator, lines padded to the longest of the batch."""
    from transformers import (
        BertTokenizer,
        DataCollatorForLanguageModeling,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    special = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
    words = {f"w{index}": index for index in range(VOCABULARY_SIZE) if index not in special.values()}
    tokenizer = BertTokenizer(vocab=special | words)
    bounds = zip(chunks.offsets[:-1], chunks.offsets[1:], strict=True)
    examples = [{"input_ids": [101, *chunks.tokens[begin:end].tolist(), 102]} for begin, end in bounds]
    warm_up, ended = 5, []

    class Clock(TrainerCallback):
        def on_step_end(self, arguments, state, control, **more):
            synchronise()
            ended.append(time.perf_counter())
            if len(ended) >= warm_up + 3 and (ended[-1] - ended[warm_up] > seconds or len(ended) > warm_up + most):
                control.should_training_stop = True

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=10_000, per_device_train_batch_size=batch_size, bf16=precision == "bf16",
            fp16=precision == "fp16", report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no",
            use_cpu=DEVICE.type == "cpu",
        )  # fmt: skip
        collator = DataCollatorForLanguageModeling(tokenizer)
        loop = Trainer(
            random_bert(size), arguments, train_dataset=examples, data_collator=collator, callbacks=[Clock()]
        )
        loop.remove_callback(PrinterCallback)
        loop.train()
    steps = len(ended) - 1 - warm_up
    return steps * batch_size * len(chunks.tokens) / len(chunks) / (ended[-1] - ended[warm_up])


def matrix_peak(precision: str) -> float:
    """Floating-point operations a second in the best of ten products of square matrices."""
    side = 8192 if DEVICE.type == "cuda" else 1024
    matrix = torch.randn(side, side, device=DEVICE, dtype=DTYPES[precision])
    seconds = []
    for _ in range(10):
        synchronise()
        began = time.perf_counter()
        matrix @ matrix
        synchronise()
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def operations_per_token(size: str, length: float) -> float:
    """What forward and backward need for one token of a line of `length`; the head for 15% of the tokens."""
    layers, hidden, _ = SCRATCH_SIZES[size]
    encoder = layers * (12 * hidden**2 + 2 * hidden * length)  # weights, then scores and their sums over values
    return 6 * (encoder + 0.15 * (hidden**2 + hidden * VOCABULARY_SIZE))


def speed_table(size: str, lengths: list[int], positions: int, seconds: float, most: int) -> None:
    """A row for each length of lines and system."""
    precision = native_precision() if DEVICE.type == "cuda" else "no"
    peak = matrix_peak(precision)
    print(f"\nBERT-{size}, {precision}, {positions:,} positions a step; matrix peak {peak / 1e12:.1f} TFLOP/s\n")
    print("| lines of about | system | tokens/s | of Trainer's | share of the matrix peak | peak memory, GiB |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |", flush=True)
    for length in lengths:
        batch_size = max(1, positions // (length + 2))
        chunks = random_chunks(length, max(4 * batch_size, 256))
        systems: dict[str, Callable[[], float]] = {
            "transformers.Trainer": partial(trainer, size, chunks, batch_size, precision, seconds, most),
            "this project": partial(ours, size, chunks, batch_size, precision, False, seconds, most),
        }
        if DEVICE.type == "cuda":
            systems["this project, compiled"] = partial(ours, size, chunks, batch_size, precision, True, seconds, most)
        of_trainer = 0.0
        for name, tokens_per_s in systems.items():
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            speed = tokens_per_s()
            of_trainer = of_trainer or speed
            share = speed * operations_per_token(size, len(chunks.tokens) / len(chunks)) / peak
            memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if DEVICE.type == "cuda" else "not measured"
            print(
                f"| {length} | {name} | {speed:,.0f} | {speed / of_trainer:.2f} | {share:.0%} | {memory} |", flush=True
            )


# ----------------------------------------------------------------------------------------------------------------- main


def checks(quick: bool) -> Iterator[tuple[str, Callable[[], str] | str]]:
    """Each check by name: what to call, or why it is left out."""
    formats = ["no", "bf16", "fp16"] if DEVICE.type == "cuda" else ["no", "bf16"]
    chunks = 2 if quick else 64  # most CPUs have no arithmetic in bf16, and take minutes for more
    for family in ("bert", "roberta", "modernbert"):
        for precision in formats:
            name = f"{family}: packed rows against the stock model, {precision}"
            yield name, partial(packed_is_stock, family, chunks, precision, False)
        for precision in formats[1:]:
            name = f"{family}: variable-length attention against the stock model, {precision}"
            fits = has_variable_lengths(random_encoder(family), 0.0, precision)
            yield name, partial(packed_is_stock, family, chunks, precision, True) if fits else "no such kernels here"
    for precision in formats[1:]:
        fits = has_variable_length_kernels(0.0, precision, head_size=64)
        yield (
            f"zeros filled in its backward pass, {precision}",
            (partial(backward_fills_no_zeros, precision) if fits else "no such kernels here"),
        )
    gpu = DEVICE.type == "cuda"
    yield "memory trial, and memory that runs out", memory_trial_and_out_of_memory if gpu else "no GPU"
    steps = 5 if quick else 50
    yield "GPU and CPU, float32", partial(one_device_is_the_other, steps) if gpu or quick else "no GPU"
    lacks = f"without {', '.join(MISSING)}" if MISSING else ""
    yield "stopped and resumed", lacks or partial(resumed_is_uninterrupted, 12 if quick else 30)
    few = "" if torch.cuda.device_count() > 1 else "fewer than two GPUs"
    yield "two GPUs and one", lacks or few or partial(two_gpus_are_one, 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small models and few steps")
    parser.add_argument("--size", choices=SCRATCH_SIZES, help="of the model whose speed is measured; base, or tiny")
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.backends.cuda.matmul.allow_tf32 = False
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or "CPU"
    names = ("torch", "transformers", "accelerate")
    print(card, f"{torch.cuda.device_count()} GPUs", *(f"{name} {version(name)}" for name in names), sep=", ")
    print("\n| check | result |\n| --- | --- |", flush=True)
    failed = False
    for name, check in checks(given.quick):
        try:
            result = f"left out: {check}" if isinstance(check, str) else check()
        except Exception as error:  # the next check may still tell something
            failed, result = True, f"FAILED: {type(error).__name__}: {error}"
        print(f"| {name} | {result} |", flush=True)
    if given.quick:
        speed_table(given.size or "tiny", [25], 1024, seconds=1, most=3)
    else:
        speed_table(given.size or "base", [25, 100, 512], 1 << 16, seconds=12, most=10_000)
    sys.exit(failed)


if __name__ == "__main__":
    main()
