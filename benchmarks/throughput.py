"""Real tokens a second of this project's training step, beside the loops that a user would pick instead.

    python benchmarks/throughput.py --sizes mini small --lengths 25 100 --repeats 3 --peer run_mlm_no_trainer.py

Every measurement is a process of its own, and they take turns. A *real* token is one of the text's own: padding, [CLS]
and [SEP] do not count. The *share of the peak* is the arithmetic that the model needs for those tokens, with the loss
at the masked ones alone, over what this machine does in a 2048 x 2048 matrix product of the same number format.
"""

import argparse
import csv
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

BLOCK = 128  # tokens in a block of the Trainer's, and in a padded line
POSITIONS_PER_STEP = 16 * BLOCK  # for every system
STEPS, WARM_UP = 12, 4  # optimizer steps; the first few are not counted
SYSTEMS = {
    "padded lines, loss everywhere": "padded",
    "transformers.Trainer on blocks": "trainer",
    "run_mlm_no_trainer.py": "peer",
    "this project": "ours",
}


def prepare(folder: Path, sizes: list[str], lengths: list[int], given_tokenizer: str | None) -> None:
    """Writes lines of about `lengths` tokens from the demo's corpus, and a checkpoint of random weights a size."""
    from transformers import AutoTokenizer

    from mlm.data.tokenizer import learn_tokenizer
    from mlm.text.demo import write_corpus

    write_corpus(folder / "corpus")
    words = (folder / "corpus" / "train.txt").read_text(encoding="utf-8").split()
    tokenizer = learn_tokenizer(lambda: iter([" ".join(words)]), 30522)
    if given_tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(given_tokenizer)
    tokens_in = {word: len(tokenizer.tokenize(word)) for word in set(words)}
    for length in lengths:
        draw, lines, line, room = random.Random(0), [], [], 0
        for word in words:
            if room <= 0:
                lines.append(" ".join(line))
                line, room = [], min(draw.randint(length // 2, length * 3 // 2), BLOCK - 12)
            line.append(word)
            room -= tokens_in[word]
        (folder / f"lines-{length}").mkdir()
        for split, part in (("test", lines[1:51]), ("train", lines[51:])):
            text = "".join(f"{line}\n" for line in part)
            (folder / f"lines-{length}" / f"{split}.txt").write_text(text, encoding="utf-8")
    for size in sizes:
        random_bert(folder / size, size, [" ".join(words)], given_tokenizer)


def random_bert(folder: Path, size: str, lines: list[str], tokenizer: str | None = None) -> Path:
    """A checkpoint of random weights, a BERT or, as "modernbert", 6 layers of 384 units of a ModernBERT, with the given
    vocabulary, or one up to BERT's size learned from the lines."""
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, ModernBertConfig

    from Config import SCRATCH_SIZES
    from mlm.data.tokenizer import learn_tokenizer

    vocabulary = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else learn_tokenizer(lambda: iter(lines), 30522)
    layers, hidden, _ = (6, 384, None) if size == "modernbert" else SCRATCH_SIZES[size]
    shape = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": hidden // 64}
    shape |= {"vocab_size": len(vocabulary)}
    if size == "modernbert":  # whose layers have gates: 1.5 widths and as many for them
        config = ModernBertConfig(intermediate_size=3 * hidden // 2, pad_token_id=vocabulary.pad_token_id, **shape)
    else:
        config = BertConfig(intermediate_size=4 * hidden, **shape)
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    vocabulary.save_pretrained(folder)
    return folder


def padded(model: Path, text: Path, bf16: bool) -> float:
    """Each line padded to 128, every position predicted: how small scripts do it. Real tokens a second."""
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer, bert = AutoTokenizer.from_pretrained(model), AutoModelForMaskedLM.from_pretrained(model).train()
    optimizer = torch.optim.AdamW(bert.parameters(), lr=1e-4)
    lines, each = (text / "train.txt").read_text(encoding="utf-8").splitlines(), POSITIONS_PER_STEP // BLOCK
    tokens = 0
    for step in range(STEPS):
        if step == WARM_UP:
            began, tokens = time.perf_counter(), 0
        batch = lines[step * each : (step + 1) * each]
        inputs = tokenizer(batch, padding="max_length", truncation=True, max_length=BLOCK, return_tensors="pt")
        tokens += int(inputs["attention_mask"].sum()) - 2 * each
        labels, hidden = inputs["input_ids"].clone(), torch.rand(inputs["input_ids"].shape) < 0.15
        inputs["input_ids"][hidden] = tokenizer.mask_token_id
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = bert(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tokens / (time.perf_counter() - began)


def trainer(model: Path, text: Path, bf16: bool) -> float:
    """transformers.Trainer and its collator, on lines joined and cut into blocks of 128. Real tokens a second."""
    from transformers import (
        AutoModelForMaskedLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = joined(tokenizer, text)
    blocks = [{"input_ids": ids[i : i + BLOCK]} for i in range(0, len(ids) - BLOCK, BLOCK)]
    ended = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments, **more):
            ended.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        each = POSITIONS_PER_STEP // BLOCK
        arguments = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=each, bf16=bf16, report_to="none",
            disable_tqdm=True, save_strategy="no", use_cpu=True,
        )  # fmt: skip
        Trainer(
            AutoModelForMaskedLM.from_pretrained(model), arguments, train_dataset=blocks,
            data_collator=DataCollatorForLanguageModeling(tokenizer), callbacks=[Clock()],
        ).train()  # fmt: skip
    return (STEPS - WARM_UP) * POSITIONS_PER_STEP * real_share(tokenizer, ids) / (ended[-1] - ended[WARM_UP - 1])


def joined(tokenizer, text: Path) -> list[int]:
    """The tokens of all lines end to end, as Trainer's examples and run_mlm_no_trainer.py make blocks of them."""
    return list(
        chain.from_iterable(tokenizer((text / "train.txt").read_text(encoding="utf-8").splitlines())["input_ids"])
    )


def real_share(tokenizer, ids: list[int]) -> float:
    special = set(tokenizer.all_special_ids)
    return sum(token not in special for token in ids) / len(ids)


def peer(model: Path, text: Path, bf16: bool) -> float:
    """transformers' example script itself. Two runs, of which only the longer has STEPS steps more, tell its speed."""
    from transformers import AutoTokenizer

    seconds = []
    for steps in (1, 1 + STEPS):
        began = time.perf_counter()
        run_peer(os.environ["PEER"], model, text, bf16, "--max_train_steps", str(steps))
        seconds.append(time.perf_counter() - began)
    tokenizer = AutoTokenizer.from_pretrained(model)
    real = real_share(tokenizer, joined(tokenizer, text))
    return STEPS * POSITIONS_PER_STEP * real / (seconds[1] - seconds[0])


def run_peer(script: str, model: Path, text: Path, bf16: bool, *flags: str) -> None:
    """run_mlm_no_trainer.py on train.txt, with an evaluation on test.txt at the end, in a process of its own."""
    each = str(POSITIONS_PER_STEP // BLOCK)
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "bf16" if bf16 else "no", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as cache:  # of the datasets library, which is to prepare the text each time
        done = subprocess.run(
            [
                sys.executable, script, "--model_name_or_path", str(model), "--train_file", str(text / "train.txt"),
                "--validation_file", str(text / "test.txt"), "--max_seq_length", str(BLOCK),
                "--per_device_train_batch_size", each, "--per_device_eval_batch_size", each, *flags,
            ],
            env=environment | {"HF_DATASETS_CACHE": cache}, capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)


def ours(model: Path, text: Path, bf16: bool) -> float:
    """train.py itself: tokens a second as metrics.csv has them. The batch has as many positions as the others'."""
    import train
    from Config import Config

    length = int(text.name.partition("-")[2])
    with tempfile.TemporaryDirectory() as folder:
        train.main(
            Config(
                initial_pretrain_model=str(model), initial_pretrain_tokenizer=str(model), path_datasets=str(text),
                path_model_save=folder, run_name="run", max_steps=STEPS, log_every=WARM_UP, tracker="none",
                batch_size=POSITIONS_PER_STEP // (length + 2), mixed_precision="bf16" if bf16 else "no",
                mlm_probability=0.15,
            )
        )  # fmt: skip
        with open(Path(folder) / "run" / "metrics.csv", newline="") as file:
            speeds = [float(row["tokens_per_s"]) for row in csv.DictReader(file) if row["tokens_per_s"]]
    return statistics.harmonic_mean(speeds[1:])  # a row covers as many steps as the warm-up


def matrix_peak(bf16: bool) -> float:
    """Floating-point operations a second in the best of ten 2048 x 2048 matrix products."""
    import torch

    matrix = torch.randn(2048, 2048).to(torch.bfloat16 if bf16 else torch.float32)
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(seconds)


def operations_per_token(model: Path, length: int) -> float:
    """What forward and backward need for one real token of a line of `length`; the head for 15% of the tokens."""
    config = json.loads((model / "config.json").read_text())
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    matrices = (3 if config["model_type"] == "modernbert" else 2) * config["intermediate_size"] + 4 * hidden
    encoder = layers * (matrices * hidden + 2 * hidden * length)  # weights, then scores and their sums over values
    head = 0.15 * (hidden**2 + hidden * config["vocab_size"])
    return 6 * (encoder + head)


def native_formats() -> list[str]:
    from mlm.runtime.hardware import native_precision

    return ["float32", "bf16"] if native_precision() == "bf16" else ["float32"]


def measure(arguments: list[str]) -> dict:
    """Runs this file with `--one` in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--one", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["mini", "small"], help="of SCRATCH_SIZES, or modernbert")
    parser.add_argument("--lengths", nargs="+", type=int, default=[25, 100], help="tokens a line, about")
    parser.add_argument("--tokenizer", help="Hub name or local folder; otherwise one is learned from the text")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--formats", nargs="+", default=native_formats(), choices=["float32", "bf16"])
    parser.add_argument(
        "--peer", type=Path, help="transformers' examples/pytorch/language-modeling/run_mlm_no_trainer.py"
    )
    parser.add_argument("--json", type=Path, default=Path("throughput.json"), help="receives every measurement")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # system, model, text, bf16: measure() calls it
    given = parser.parse_args()
    if given.one:
        system, model, text, bf16 = given.one
        speed = globals()[system](Path(model), Path(text), bf16 == "bf16")
        who = resource.RUSAGE_CHILDREN if system == "peer" else resource.RUSAGE_SELF
        memory = resource.getrusage(who).ru_maxrss / 1024
        print(json.dumps({"tokens_per_s": speed, "peak_mib": memory, "peak_flops": matrix_peak(bf16 == "bf16")}))
        return

    if given.peer:
        os.environ["PEER"] = str(given.peer.resolve())
    names = ("torch", "transformers", "accelerate")
    print(platform.platform(), *(f"{name} {version(name)}" for name in names), sep=", ", flush=True)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, given.sizes, given.lengths, given.tokenizer)
        for size in given.sizes:
            for length in given.lengths:
                model, text = folder / size, folder / f"lines-{length}"
                systems = [name for name in SYSTEMS if given.peer or SYSTEMS[name] != "peer"]
                runs = {(name, dtype): [] for name in systems for dtype in given.formats}
                for _ in range(given.repeats):
                    for name, dtype in runs:
                        runs[name, dtype].append(measure([SYSTEMS[name], str(model), str(text), dtype]))
                print(f"\n{size}, lines of about {length} tokens; medians of {given.repeats}\n")
                print("| | tokens/s | share of the matrix peak | peak memory, MiB |\n| --- | ---: | ---: | ---: |")
                for (name, dtype), each in runs.items():
                    speed, memory, peak = (statistics.median(run[key] for run in each) for key in each[0])
                    share = speed * operations_per_token(model, length) / peak
                    print(f"| {name}, {dtype} | {speed:,.0f} | {share:.0%} | {memory:,.0f} |", flush=True)
                    found.append({"size": size, "length": length, "system": name, "dtype": dtype, "runs": each})
    given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
