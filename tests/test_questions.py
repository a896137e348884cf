"""docs/questions.md: each message in its tables is one that the program says, word for word."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import ROOT
from safetensors.torch import load_file, save_file
from texts import make_lines
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer, PreTrainedTokenizerBase

from Config import Config, DownstreamConfig
from mlm.data.text_stats import SplitStats, TextStats, text_warnings
from mlm.data.tokenizer import SPECIAL_TOKENS, load_pretrained_tokenizer, load_tokenizer, tokenizer_warnings
from mlm.downstream.task import load_task
from mlm.errors import UserError
from mlm.report import wording
from mlm.runtime import launch
from mlm.runtime.hub import locate
from mlm.text.files import find_text
from mlm.training.progress import Progress
from mlm.training.run import Ending
from model import load_encoder, load_model

PAGES = [ROOT / "docs" / "questions.md", ROOT / "docs" / "zh-CN" / "questions.md"]


@dataclass
class Place:
    """What a message needs to come about."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    settings: Callable[..., Config]
    monkeypatch: Any

    def checkpoint(self, kind: Any = BertForMaskedLM, **changes: Any) -> str:
        """A small BERT with its tokenizer."""
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        path = self.folder / "checkpoint"
        kind(BertConfig(**{"vocab_size": len(self.tokenizer)} | shape | changes)).save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        return str(path)

    def spoilt(self, spoil: Callable[[dict], dict]) -> str:
        """That, with other weights."""
        name = self.checkpoint()
        weights = spoil(load_file(Path(name, "model.safetensors")))
        save_file(weights, Path(name, "model.safetensors"), metadata={"format": "pt"})
        return name

    def with_file(self, file: str, content: str, instead_of: str = "") -> str:
        """A small BERT with another file, instead of one of its own."""
        name = self.checkpoint()
        if instead_of:
            Path(name, instead_of).unlink()
        Path(name, file).write_text(content, encoding="utf-8")
        return name

    def words(self, *words: str, **options: Any) -> PreTrainedTokenizerBase:
        return BertTokenizer(vocab={word: index for index, word in enumerate([*SPECIAL_TOKENS, *words])}, **options)


def refused(act: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        act(*arguments)
    return str(error.value)


def start(place: Place, model: str, **changes: Any) -> list[str]:
    """The warnings of a start."""
    config = place.settings(initial_pretrain_model=model, initial_pretrain_tokenizer=model, **changes)
    return load_model(config, len(place.tokenizer), 0)[1]


def another_vocabulary(place: Place) -> str:
    name, other = place.checkpoint(), place.folder / "other"
    words = place.tokenizer.convert_ids_to_tokens(range(5, len(place.tokenizer)))
    place.words(*reversed(words)).save_pretrained(other)
    config = place.settings(initial_pretrain_model=name, initial_pretrain_tokenizer=str(other))
    return refused(load_tokenizer, config, None, "")


def byte_pairs(place: Place) -> str:
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    content = Tokenizer(models.BPE(vocab=vocabulary, merges=[])).to_str()
    return refused(load_pretrained_tokenizer, place.with_file("tokenizer.json", content), "models")


def answered(place: Place, answers: str) -> str:
    """What ./run.sh says of a configuration file."""
    file = place.folder / "default_config.yaml"
    file.write_text(answers)
    for module in ("launch", "config.config_args"):
        place.monkeypatch.setattr(f"accelerate.commands.{module}.default_config_file", str(file))
    place.monkeypatch.setattr(sys, "argv", ["launch", "--demo"])
    place.monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    return refused(launch.main)


GPUS = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 9\nmixed_precision: 'no'\n"
LFS = "version https://git-lfs.github.com/spec/v1\n"

TEXT = "one line\nand another\n"
CHINESE_TEXT = "\n".join(line for line in make_lines(400) if not line.isascii())


def of_text(place: Place, files: dict[str, str | bytes]) -> str:
    """What is said of a folder of text: its notes, or why it is refused."""
    folder = place.folder / "corpus"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        text = find_text(place.settings(path_datasets=str(folder)))
        return "\n".join([*text.notes, *text.train()])
    except UserError as error:
        return str(error)


def of_task(place: Place, files: dict[str, str]) -> str:
    """Why a labelled file, or a folder of several, is refused."""
    for name, content in files.items():
        (place.folder / "task" / name).parent.mkdir(exist_ok=True)
        (place.folder / "task" / name).write_text(content, encoding="utf-8")
    task = place.folder / "task" / (name if len(files) == 1 else "")
    return refused(load_task, DownstreamConfig(task=str(task), models=("a",)))


def statistics(unknown: int = 0, repeated: int = 0) -> TextStats:
    split = SplitStats(9, 0, 0, 0, 99, tokens=99, unknown=unknown, chunks=9, line_lengths=[])
    return TextStats(split, split, test_lines_in_train=repeated, unigram_perplexity=100.0, split_words=[])


def summary(**last: float) -> Any:
    """A run whose last evaluation was this."""
    before = {"step": 0.0, "perplexity": 9.0, "perplexity_se": 0.1}
    return SimpleNamespace(
        settings={"initial_pretrain_model": "bert", "evaluate_only": False, "eval_every": 1}, derived={},
        text=statistics(), evaluations=[before, before | {"step": 2.0} | last], has_trained=True,
        stops_early=False,
    )  # fmt: skip


def diverged(place: Place) -> str:
    setup, progress = SimpleNamespace(config=place.settings(learning_rate=1.0), folder=place.folder), Progress()
    return wording.describe_divergence(setup, progress, Ending.SKIPPING, saved_step=None)


# By a part of each message that no other has: how it comes about.
SAYS: dict[str, Callable[[Place], str]] = {
    "the Hub (": lambda place: refused(locate, "no/such-model", "models"),
    "no encoder that can be trained here": lambda place: refused(
        load_encoder, place.with_file("config.json", '{"model_type": "deberta-v2"}')
    ),
    "of BERT's weights": lambda place: refused(
        load_encoder, place.spoilt(lambda weights: {f"module.{name}": weight for name, weight in weights.items()})
    ),
    "has the shape": lambda place: refused(
        load_encoder, place.spoilt(lambda weights: {name: weight[:8] for name, weight in weights.items()})
    ),
    "not finite": lambda place: refused(
        load_encoder, place.spoilt(lambda weights: {name: weight / 0 for name, weight in weights.items()})
    ),
    "Git LFS": lambda place: refused(load_encoder, place.with_file("model.safetensors", LFS)),
    "TensorFlow": lambda place: refused(load_encoder, place.with_file("bert_config.json", "{}", "config.json")),
    "tokenizer.json is BPE": byte_pairs,
    "are others in": another_vocabulary,
    "can never come of text": lambda place: tokenizer_warnings(place.words("The", "the"), "it")[0],
    "has a capital letter": lambda place: tokenizer_warnings(place.words("a", "b", do_lower_case=False), "it")[0],
    "are no token's": lambda place: start(place, place.checkpoint(vocab_size=1000))[0],
    "positions of": lambda place: refused(partial(start, sen_max_length=600), place, place.checkpoint()),
    "no masked-language-model head": lambda place: start(place, place.checkpoint(BertModel))[0],
    "knows nothing": lambda place: wording.ignorance(1000.0, 1.0, unigram=900.0, vocabulary=30_000),
    **{
        part: partial(of_text, files=files)
        for part, files in {
            "no train*.txt": {"notes.pdf": "x"},
            "there is no test file": {"train.txt": TEXT, "valid.txt": TEXT},
            "not read in": {"train.txt": TEXT, "test.txt": TEXT, "train.docx": "x"},
            "has no column …, but": {"train.csv": "title,body\na,b\n"},
            "a damaged character": {"train.txt": "二甲双胍\n".encode() * 9 + b"\xe4\xba\n"},
            "not UTF-8; it looks like": {"train.txt": CHINESE_TEXT.encode("gb18030")},
            "end in \\r alone": {"train.txt": "one\rtwo\rthree"},
        }.items()
    },
    **{
        part: partial(of_task, files=files)
        for part, files in {
            "a word and a tag, in as": {"a.conll": "word O\n\none word B-X\n\nword O\n"},
            "has the tag": {"a.conll": "word O\nword B-X\n\nword B-Y\nword PER-B\n"},
            "put a blank line": {"a.conll": "word O\nword B-X\n"},
            "as many tags": {"a.jsonl": '{"tokens": ["word"], "ner_tags": [1]}\n'},
            "different labels for": {"a.csv": "text,label\n" + "".join(f"text {n},{n / 7:.2f}\n" for n in range(20))},
            "are these text and label": {"a.tsv": "1\ta text\tx\ty\n"},
            "of a usual name": {"a.csv": "first,label\na,b\n"},
            "is not JSON": {"a.jsonl": '{"text": "a", '},
            "has no test file": {"train.tsv": "a text\tx\n", "heldout.tsv": "a text\tx\n"},
            "nothing to tell apart": {"a.tsv": "a text\tx\nanother\tx\n"},
        }.items()
    },
    "tokens are [UNK]": lambda place: text_warnings(statistics(unknown=9), "bert", only_test=False)[0],
    "tested on lines": lambda place: text_warnings(statistics(repeated=1), "bert", only_test=False)[0],
    "no finite loss": diverged,
    "Word frequencies": lambda place: wording.notes(summary(perplexity=1000.0, perplexity_se=1.0))[0],
    "Cannot tell": lambda place: wording.verdict(summary(change=0.0, change_low=-0.1, change_high=0.1)),
    "was lowest": lambda place: wording.trend(summary(best_step=1.0, trend=0.2, trend_low=0.1, trend_high=0.3)),
    "cannot be used": lambda place: answered(place, ""),
    "can be used here": lambda place: answered(place, GPUS),
}


def messages(page: Path) -> list[str]:
    """The first cells of the tables."""
    return re.findall(r"^\| `([^`]+)` \|", page.read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("message", messages(PAGES[0]))
def test_each_message_is_what_the_program_says(message, tmp_path, tokenizer, settings, monkeypatch):
    [produce] = [produce for part, produce in SAYS.items() if part in message]
    torch.manual_seed(0)
    said = produce(Place(tmp_path, tokenizer, settings, monkeypatch))
    assert re.search(".*".join(map(re.escape, message.split("…"))), said), said


def test_both_languages_have_the_same_messages():
    assert messages(PAGES[0]) == messages(PAGES[1])
    assert len(messages(PAGES[0])) == len(SAYS)
