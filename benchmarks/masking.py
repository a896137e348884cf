"""Does masking whole words help? The same model trained on Chinese titles with tokens, words and spans masked.

    python benchmarks/masking.py --titles dev.txt --test test.txt

Both files hold `title<TAB>class` a line. train.py trains a model from scratch on the titles of --titles, one run a
masking and seed; each is scored by the same evaluation on the titles of --test (BERT's token masking), then with whole
words masked there, then fine-tuned to tell the class from some labelled titles, and tested on --test. One more model is
fine-tuned from random weights.
"""

import argparse
import csv
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForMaskedLM, logging

from mlm.data.chinese import make_segmenter
from mlm.data.masking import MaskRule, content_keys, mask
from mlm.data.micro_batches import MicroBatcher
from mlm.data.packing import frame
from mlm.data.tokenizer import read_vocabulary
from mlm.data.words import make_encoders, tokenize
from mlm.encoder.packed import PackedMaskedLM

ROOT = Path(__file__).parent.parent
MASKINGS = {"tokens": [], "whole words": ["--whole_words_mask"], "spans of words": ["--mask_span"]}
BATCH, RATE, EPOCHS = 32, 5e-4, 5  # of the fine-tuning
LONGEST = 64


def read(path: Path) -> list[tuple[str, int]]:
    rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return [(title, int(label)) for title, label in rows]


def pretrain(text: Path, output: Path, masking: str, seed: int, given: argparse.Namespace) -> tuple[Path, float]:
    """train.py's final folder, and its perplexity on the test titles."""
    flags = {
        "initial_pretrain_model": f"scratch:{given.size}", "initial_pretrain_tokenizer": "corpus",
        "path_datasets": text, "path_model_save": output, "run_name": f"{masking} {seed}", "seed": seed,
        "num_epochs": given.epochs, "learning_rate": given.rate,
        "eval_every": 10**6, "tracker": "none", "hidden_dropout": 0.0,
    }  # fmt: skip
    command = [sys.executable, "train.py", *(f"--{name}={value}" for name, value in flags.items()), *MASKINGS[masking]]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    folder = output / f"{masking} {seed}"
    with open(folder / "metrics.csv", newline="") as file:
        [*_, last] = csv.DictReader(file)
    return folder / "final", float(last["perplexity"])


@torch.no_grad()
def perplexity_of_words(final: Path, titles: list[str]) -> float:
    """The perplexity on titles in which whole words are masked, on masks that depend on the titles alone."""
    tokenizer = AutoTokenizer.from_pretrained(final)
    vocabulary = read_vocabulary(tokenizer)
    model = PackedMaskedLM(BertForMaskedLM.from_pretrained(final)).eval()
    tokens, lengths, starts_word, *_ = tokenize(titles, make_encoders(tokenizer), vocabulary, make_segmenter([]))
    lengths, rule = lengths[lengths > 0], MaskRule(whole_words=True)
    masked = mask(tokens, lengths, content_keys(tokens, lengths), vocabulary, rule, starts_word)
    loss = number = 0
    micro_batcher = MicroBatcher(vocabulary, torch.device("cpu"), varlen=False, longest_chunk=128, max_positions=4096)
    for inputs, targets in micro_batcher(frame(*masked, lengths, vocabulary)):
        loss += F.cross_entropy(model(**inputs), targets, reduction="sum").item()
        number += len(targets)
    return math.exp(loss / number)


def accuracy(model: Path, train: list[tuple[str, int]], test: list[tuple[str, int]], seed: int, fresh: bool) -> float:
    """Share of the test titles whose class a classifier finds that was fine-tuned on the training titles."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    classes = 1 + max(label for _, label in train)
    classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=classes)
    if fresh:
        classifier = AutoModelForSequenceClassification.from_config(classifier.config)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=RATE, weight_decay=0.01)
    steps = EPOCHS * (len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 50) * (1 - step / steps))

    def batch(rows):
        titles, labels = zip(*rows, strict=True)
        options = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
        return tokenizer(list(titles), **options), torch.tensor(labels)

    draw = random.Random(seed)
    classifier.train()
    for _ in range(EPOCHS):
        order = draw.sample(train, len(train))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            inputs, labels = batch(order[start : start + BATCH])
            classifier(**inputs, labels=labels).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    classifier.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(test), 256):
            inputs, labels = batch(test[start : start + 256])
            right += int((classifier(**inputs).logits.argmax(-1) == labels).sum())
    return right / len(test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--titles", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--size", default="tiny", help="of scratch:")
    parser.add_argument("--epochs", type=int, default=30, help="of the pre-training")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of the pre-training")
    parser.add_argument("--labelled", type=int, default=2000, help="titles to fine-tune on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=Path("masking.json"), help="receives every measurement")
    given = parser.parse_args()

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers", "rjieba")]
    print(platform.platform(), f"{os.cpu_count()} cores", *versions, sep=", ", flush=True)
    rows, test = read(given.titles), read(given.test)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        text, output = Path(scratch, "text"), Path(scratch, "output")
        text.mkdir()
        for split, of_split in (("train", rows), ("test", test)):
            lines = [f"{title}\n" for title, _ in of_split]
            (text / f"{split}.txt").write_text("".join(lines), encoding="utf-8", newline="\n")
        for seed in given.seeds:
            labelled = random.Random(seed).sample(rows, given.labelled)
            for masking in MASKINGS:
                final, perplexity = pretrain(text, output, masking, seed, given)
                right = accuracy(final, labelled, test, seed, fresh=False)
                of_words = perplexity_of_words(final, [title for title, _ in test])
                scores = {"perplexity": perplexity, "of_words": of_words, "accuracy": right}
                found.append({"masking": masking, "seed": seed} | scores)
                print(found[-1], flush=True)
            right = accuracy(final, labelled, test, seed, fresh=True)
            found.append({"masking": "no pre-training", "seed": seed, "accuracy": right})
            print(found[-1], flush=True)
            given.json.write_text(json.dumps(found, indent=1))

    print("\n| masked in training | perplexity | with whole words masked | accuracy |\n| --- | ---: | ---: | ---: |")
    for masking in [*MASKINGS, "no pre-training"]:
        cells = []
        for kind, form in (("perplexity", "{:.1f}"), ("of_words", "{:.1f}"), ("accuracy", "{:.2%}")):
            values = [each[kind] for each in found if each["masking"] == masking and kind in each]
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            cells.append(f"{form} ± {form}".format(statistics.mean(values), spread) if values else "")
        print(f"| {masking} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
