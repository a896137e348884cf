"""Small models of random weights, labelled texts, and what a comparison wrote; for the tests beside this file."""

import csv
import random
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer

from mlm.data.tokenizer import SPECIAL_TOKENS

WORDS = [f"w{n}" for n in range(30)]
SIGNS = ["good", "bad"]  # the two words that give the label away


def save_model(folder: Path, words: list[str] = WORDS + SIGNS, seed: int = 0, pooler: bool = False) -> str:
    """A small BERT of random weights with a vocabulary of whole words."""
    torch.manual_seed(seed)
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *words])}
    config = BertConfig(
        vocab_size=len(vocabulary), num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    (BertModel(config) if pooler else BertForMaskedLM(config)).save_pretrained(folder)
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return str(folder)


def make_rows(number: int, seed: int, given_away: float = 1.0) -> list[tuple[str, str]]:
    """Random words and a label that a sign among them gives away, in a share of the texts."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        label = draw.randrange(2)
        words = draw.choices(WORDS, k=draw.randint(3, 12))
        if draw.random() < given_away:
            words.insert(draw.randrange(len(words)), SIGNS[label])
        rows.append((" ".join(words), ["no", "yes"][label]))
    return rows


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def verdicts(folder: Path) -> list[str]:
    return [row["sentence"] for row in read_csv(folder / "comparison.csv")]


def accuracies(folder: Path, model: str) -> list[float]:
    return [float(row["accuracy"]) for row in read_csv(folder / "results.csv") if row["model"] == model]
