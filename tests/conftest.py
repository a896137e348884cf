"""A tiny corpus in English and Chinese with emoji, a tokenizer learned from it, and no way to the network."""

import os
import random
from functools import partial
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "ACCELERATE_USE_CPU": "true"}

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from Config import Config
from mlm.text import Text, read_lines
from mlm.vocabulary import learn_tokenizer, read_vocabulary

ENGLISH = [
    "the",
    "patient",
    "was",
    "given",
    "metformin",
    "for",
    "type",
    "two",
    "diabetes",
    "and",
    "hypertension",
    ",",
    "then",
    "insulin",
    ";",
    "doctors",
    "followed",
    "up",
    "every",
    "three",
    "months",
]
IGNORED = -100  # the label of a position where nothing is predicted, in transformers
CHINESE = "患者服用二甲双胍治疗糖尿病和高血压医生随访三个月后血糖下降明显"


def make_lines(number: int, seed: int = 0) -> list[str]:
    """Lines of 1 to 60 words or characters, in either language, some with emoji."""
    draw = random.Random(seed)
    lines = []
    for _ in range(number):
        if draw.random() < 0.5:
            line = " ".join(draw.choices(ENGLISH, k=draw.randint(1, 60))).capitalize()
        else:
            line = "".join(draw.choices(CHINESE, k=draw.randint(1, 60))) + "。"
        lines.append(line + draw.choice(["", " 😀", " 👍🏽!"]))
    return lines


def labelled(input_ids: np.ndarray, masked: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The input ids, and labels of their shape as the stock models take them."""
    assert (np.diff(masked) > 0).all()
    labels = np.full(input_ids.size, IGNORED)
    labels[masked] = targets
    return input_ids, labels.reshape(input_ids.shape)


@pytest.fixture(scope="session")
def tokenizer():
    return learn_tokenizer(lambda: iter(make_lines(400)), 300)


@pytest.fixture(scope="session")
def vocabulary(tokenizer):
    return read_vocabulary(tokenizer)


@pytest.fixture
def text_folder(tmp_path):
    """A folder with train.txt of 120 lines and test.txt of 40."""
    folder = tmp_path / "text"
    folder.mkdir()
    for name, lines in (("train", make_lines(120, seed=1)), ("test", make_lines(40, seed=2))):
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture
def settings(tmp_path, text_folder):
    """Makes a Config for a run of seconds; keyword arguments change it."""
    return partial(
        Config,
        initial_pretrain_model="scratch:tiny",
        initial_pretrain_tokenizer="corpus",
        vocab_size=300,
        path_datasets=str(text_folder),
        path_model_save=str(tmp_path / "output"),
        mixed_precision="no",
        tracker="none",
        batch_size=16,
        sen_max_length=32,
    )


@pytest.fixture
def text_of():
    """Writes lines or bytes to one file a split and returns them as a Text."""

    def make(folder: Path, train: bytes, test: bytes = b"a test line\n") -> Text:
        files = {}
        for split, content in (("train", train), ("test", test)):
            files[split] = [folder / f"{split}.txt"]
            files[split][0].write_bytes(content)
        return Text(partial(read_lines, files["train"]), partial(read_lines, files["test"]), str(hash((train, test))))

    return make


@pytest.fixture(autouse=True)
def fresh_process_state():
    """accelerate keeps its state in the class; a run in a test must not see the last one's."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    torch.manual_seed(0)
