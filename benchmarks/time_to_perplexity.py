"""Time from start to a perplexity, start-up and preparation included, beside what a user would pick instead.

    python benchmarks/time_to_perplexity.py --text folder/with/train.txt/and/test.txt --peer run_mlm_no_trainer.py

The others train for one epoch, at --rate; what they end with is the perplexity to reach. This project trains for one
epoch too, or for the shorter runs that --steps names, by its own defaults for a model from random weights. Every model
is scored by this project's evaluation: BERT's masking, masks that depend on the text alone. All have the same shape and
vocabulary; each repeat has a seed of its own.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from throughput import BLOCK, POSITIONS_PER_STEP, joined, native_formats, random_bert, run_peer

ROOT = Path(__file__).parent.parent
BATCH = POSITIONS_PER_STEP // BLOCK  # lines or blocks an optimizer step


def peer(model: Path, text: Path, bf16: bool, rate: str, seed: str, output: Path) -> None:
    """run_mlm_no_trainer.py, which evaluates once at the end."""
    flags = ["--num_train_epochs", "1", "--learning_rate", rate, "--seed", seed, "--output_dir", str(output)]
    run_peer(os.environ["PEER"], model, text, bf16, *flags)


def trainer(model: Path, text: Path, bf16: bool, rate: str, seed: str, output: Path) -> None:
    """transformers.Trainer on blocks; in a process of its own, as this file's `--trainer`."""
    command = [sys.executable, __file__, "--trainer", model, text, str(int(bf16)), rate, seed, output]
    subprocess.run(command, check=True, capture_output=True)


def train_by_trainer(model: str, text: str, bf16: str, rate: str, seed: str, output: str) -> None:
    from transformers import (
        AutoTokenizer,
        BertForMaskedLM,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = joined(tokenizer, Path(text))
    blocks = [{"input_ids": ids[i : i + BLOCK]} for i in range(0, len(ids) - BLOCK, BLOCK)]
    arguments = TrainingArguments(
        output, num_train_epochs=1, per_device_train_batch_size=BATCH, learning_rate=float(rate), bf16=bf16 == "1",
        seed=int(seed), report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    made = Trainer(
        BertForMaskedLM.from_pretrained(model), arguments, train_dataset=blocks,
        data_collator=DataCollatorForLanguageModeling(tokenizer),
    )  # fmt: skip
    made.train()
    made.save_model(output)


def ours(model: str, tokenizer: Path, text: Path, bf16: bool, *flags: str) -> list[tuple[float, float]]:
    """train.py, on a folder or scratch:SIZE; for every evaluation the seconds since the start and the perplexity."""
    with tempfile.TemporaryDirectory() as output:
        paths = ["--path_datasets", str(text.resolve()), "--path_model_save", output, "--run_name", "run"]
        command = [
            sys.executable, "train.py", "--initial_pretrain_model", model,
            "--initial_pretrain_tokenizer", str(tokenizer.resolve()), *paths, "--batch_size", str(BATCH),
            "--tracker", "none", "--mixed_precision", "bf16" if bf16 else "no", *flags,
        ]  # fmt: skip
        began, times = time.perf_counter(), []
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if ": perplexity " in line:  # 'before training: ...' and 'step 10/80, test: ...'
                times.append(time.perf_counter() - began)
        if process.wait():
            sys.exit(process.stderr.read())
        with open(Path(output) / "run" / "metrics.csv", newline="") as file:
            perplexities = [float(row["perplexity"]) for row in csv.DictReader(file) if row["perplexity"]]
    return list(zip(times, perplexities, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, help="a folder with train.txt and test.txt")
    parser.add_argument("--peer", type=Path, help="path to transformers' run_mlm_no_trainer.py")
    parser.add_argument("--tokenizer", help="Hub name or local folder; otherwise one is learned from the text")
    parser.add_argument("--size", default="mini", help="of Config.py's SCRATCH_SIZES")
    parser.add_argument("--rate", default="5e-4", help="peak learning rate of the others")
    parser.add_argument("--steps", nargs="*", default=[], help="of runs of this project instead of an epoch")
    parser.add_argument("--without_trainer", action="store_true", help="leave transformers.Trainer out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--formats", nargs="+", default=native_formats(), choices=["float32", "bf16"])
    parser.add_argument("--json", type=Path, default=Path("time_to_perplexity.json"), help="receives every measurement")
    parser.add_argument("--trainer", nargs=6, help=argparse.SUPPRESS)  # trainer() calls it
    given = parser.parse_args()
    if given.trainer:
        return train_by_trainer(*given.trainer)

    names = ("torch", "transformers", "accelerate")
    print(platform.platform(), *(f"{name} {version(name)}" for name in names), sep=", ", flush=True)
    others = {} if given.without_trainer else {"transformers.Trainer": trainer}
    if given.peer:
        os.environ["PEER"] = str(given.peer.resolve())
        others["run_mlm_no_trainer.py"] = peer
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lines = (given.text / "train.txt").read_text(encoding="utf-8").splitlines()
        model = random_bert(folder / "model", given.size, lines, given.tokenizer)
        for dtype in given.formats:
            bf16 = dtype == "bf16"
            lengths = {f"this project, {steps} steps": ["--max_steps", steps] for steps in given.steps}
            lengths = lengths or {"this project": ["--num_epochs", "1"]}
            runs = {name: [] for name in [*others, *lengths]}
            found.append({"size": given.size, "dtype": dtype, "runs": runs})
            for number in range(given.repeats):
                for name, train in others.items():
                    output, began = folder / f"{name}-{dtype}-{number}", time.perf_counter()
                    train(model, given.text, bf16, given.rate, str(number), output)
                    seconds = time.perf_counter() - began
                    [(_, perplexity)] = ours(str(output.resolve()), model, given.text, bf16, "--evaluate_only")
                    runs[name].append([(seconds, perplexity)])
                for name, flags in lengths.items():
                    start = f"scratch:{given.size}"
                    runs[name].append(ours(start, model, given.text, bf16, "--seed", str(number), *flags))
                given.json.write_text(json.dumps(found, indent=1))
            print(f"\n{given.size}, {dtype}; medians of {given.repeats}\n")
            print("| | seconds | perplexity |\n| --- | ---: | ---: |")
            for name, each in runs.items():
                seconds, perplexity = (statistics.median(run[-1][i] for run in each) for i in (0, 1))
                print(f"| {name} | {seconds:.0f} | {perplexity:,.1f} |", flush=True)


if __name__ == "__main__":
    main()
