"""Every setting, its type, default, unit and meaning on one line: train.py's in Config, downstream.py's below it.

Edit the defaults here, or pass flags. What values a type holds stands above the settings, what goes together below.
The defaults of hidden_dropout, optimizer and learning_rate were measured: benchmarks/RESULTS.md, "The recipe".
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from os.path import normpath
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from mlm.settings import check_settings, must, parse_settings


class Size(NamedTuple):
    """A BERT that is trained from random weights."""

    layers: int
    hidden: int
    learning_rate: float  # peak, for a batch of 32 chunks


# Layers and hidden sizes: Turc et al., Well-Read Students Learn Better (arXiv 1908.08962).
SCRATCH_SIZES = {
    "tiny": Size(2, 128, 2e-3),
    "mini": Size(4, 256, 1e-3),
    "small": Size(4, 512, 7e-4),
    "medium": Size(8, 512, 5e-4),
    "base": Size(12, 768, 1e-4),
}

MOST_AUTOMATIC_WORDS = 10_000  # the largest N of add_words=auto:N

RENAMED_FLAGS = {"seeds": "num_seeds", "least_steps": "min_steps"}  # of downstream.py, which takes the old ones too


def _is_name(text: str) -> bool:
    return bool(text.strip()) and text.isprintable()


def _is_folder_name(text: str) -> bool:
    return _is_name(text) and not text.startswith(".") and not {"/", "\\"} & {*text}


def _are_devices(text: str) -> bool:
    return text == "" or all(map(_is_name, text.split(",")))


Count = Annotated[int, Field(ge=1, lt=2**31)]
Length = Annotated[int, Field(ge=3, lt=2**31)]  # [CLS], a token, [SEP]
VocabularySize = Annotated[int, Field(ge=6, lt=2**31)]  # five special tokens and a character
Seed = Annotated[int, Field(ge=0, lt=2**62)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(gt=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
PartialShare = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, must("not be empty or hold a character that cannot be printed", _is_name)]
FolderName = Annotated[str, must("be a plain folder name, without / or \\ or a leading dot", _is_folder_name)]
Devices = Annotated[str, must("be GPUs separated by commas, such as 0,1", _are_devices)]
Precision = Literal["auto", "no", "tf32", "fp16", "bf16"]


@dataclass
class Config:
    """Continue the masked-language-model pre-training of BERT, or of its kin, on your own text."""

    # --- model
    initial_pretrain_model: Name = "bert-base-uncased"  # encoder: Hub name, folder, scratch:tiny|mini|small|medium|base
    initial_pretrain_tokenizer: Name = "bert-base-uncased"  # Hub name, local folder, or corpus: learn one from the text
    vocab_size: VocabularySize = 8192  # entries of the WordPiece vocabulary that "corpus" learns
    attention_dropout: Dropout = 0.0  # dropout inside attention while training; 0 keeps the fast attention kernels
    hidden_dropout: Dropout | None = None  # dropout elsewhere while training; unset: the checkpoint's, 0 from scratch
    add_words: Name | None = None  # file of words that become tokens, one per line, or auto:N, the N most often split

    # --- text
    path_datasets: Name = "data"  # folder of train* and test*: .txt, one example per line; or .jsonl .csv .tsv .parquet
    text_column: Name = "text"  # name of the text's column (JSON key) where path_datasets holds no .txt
    test_fraction: Share = 0.05  # share of the distinct lines held out for testing where there is no test* or dev*
    drop_duplicates: bool = False  # leave out training lines that repeat an earlier one or stand in the test text
    sen_max_length: Length = 128  # positions of a chunk: tokens, [CLS] and [SEP]; longer lines are cut into chunks
    user_words: Name | None = None  # file of words, one per line, that the Chinese segmenter is to keep whole
    path_general: Name | None = None  # folder of general text, laid out as path_datasets: shows what is forgotten
    replay_fraction: PartialShare = 0.0  # share of each step's chunks that are of path_general's training text

    # --- masking
    mlm_probability: Probability | None = None  # that a token (or word) is predicted; unset: 0.15, ModernBERT 0.3
    mlm_probability_end: Probability | None = None  # that of the last step, reached linearly; unset: always the same
    mask_replace_prob: float = 0.8  # share of the chosen that become [MASK]
    random_replace_prob: float = 0.1  # share of the chosen that become a random token; the rest stay as they are
    whole_words_mask: bool = False  # choose whole words; Chinese ones are found by a segmenter
    mask_span: bool = False  # choose runs of whole words, of geometric lengths, as SpanBERT does

    # --- optimisation
    optimizer: Literal["auto", "adamw", "muon"] = "auto"  # auto: Muon from random weights, AdamW for a checkpoint
    num_epochs: Count = 3  # times every line is seen
    max_steps: Count | None = None  # optimizer steps, whatever num_epochs says; unset: num_epochs decides
    batch_size: Count = 32  # chunks per optimizer step, over all devices
    learning_rate: Positive | None = None  # peak; unset: 3e-5 at a hidden size of 768, else by size
    num_warmup_steps: NotNegative = 0.1  # linear warm-up: below 1 a share of all steps, else a count
    schedule: Literal["linear", "constant"] = "linear"  # after warm-up: linear decay, or constant with a cool-down
    early_stop_evals: Count | None = None  # evaluations in a row without a sure gain that begin the cool-down early
    weight_decay: NotNegative | None = None  # decoupled, not on biases and LayerNorm; unset: 0.01, ModernBERT 1e-5
    max_grad_norm: Positive = 1.0  # gradients are clipped to this norm
    seed: Seed = 42  # decides order, masks, dropout, held-out lines and new weights

    # --- machine
    cuda_visible_devices: Devices = ""  # GPUs to use, such as "0" or "0,1"; empty: leave the environment alone
    mixed_precision: Precision = "auto"  # auto: the launcher's choice, else native
    compile: bool = False  # use torch.compile: the start takes minutes longer; meant for long runs on a GPU
    micro_batch_tokens: Count | None = None  # positions, with padding, per forward pass on a device; unset: what fits

    # --- output
    path_model_save: Name = "output"  # folder that receives one folder per run, and the cache of tokenized text
    run_name: FolderName | None = None  # name of this run's folder; unset: date, time and model
    log_every: Count = 50  # steps between lines in the log and in metrics.csv
    eval_every: Count | None = None  # steps between evaluations; unset: an epoch, or at most 10,000 steps
    max_test_chunks: Count | None = None  # size of the random sample of test chunks that is scored; unset: all
    save_every: Count | None = None  # steps between checkpoints, and epoch ends; unset: those and half hours
    keep_checkpoints: Count = 2  # number of checkpoints that stay on disk, the newest
    push_to_hub: str | None = None  # name on the Hugging Face Hub for the finished model, private if it is new there
    tracker: Name = "tensorboard"  # tensorboard, none, or another tracker that accelerate knows (wandb, ...)

    # --- mode
    dry_run: bool = False  # predict the run's time, memory and disk space from some seconds of it; keep nothing
    evaluate_only: bool = False  # score initial_pretrain_model on the test text, then stop; needs no training text
    resume: bool = False  # resume the last unfinished run, or run_name's, from its newest checkpoint
    demo: bool = False  # train a small BERT on the documentation of your own Python; downloads nothing
    check_only: bool = False  # check settings and text, prepare the text, then stop

    def __post_init__(self):
        """Raises UserError that names every field whose value, or combination of values, cannot work."""
        check_settings(self, _wrong_in_training(self))

    @property
    def automatic_words(self) -> int | None:
        """N behind `auto:N` in add_words, or None where it names a file or nothing."""
        prefix, _, number = (self.add_words or "").partition(":")
        is_number = number.isdecimal() and len(number) < 10  # int() refuses thousands of digits
        return int(number) if prefix == "auto" and is_number else None

    @property
    def scratch_size(self) -> str | None:
        """The name behind `scratch:`, or None where a checkpoint is continued."""
        prefix, _, size = self.initial_pretrain_model.partition(":")
        return size if prefix == "scratch" else None

    @property
    def general_chunks(self) -> int:
        """How many of a step's `batch_size` chunks are of general text."""
        return round(self.replay_fraction * self.batch_size)

    @property
    def domain_chunks(self) -> int:
        """How many of them are of the domain's own text, which epochs are counted by."""
        return self.batch_size - self.general_chunks


@dataclass
class DownstreamConfig:
    """Fine-tune several checkpoints on a labelled task of your own, and say which serves it better."""

    # --- what is compared
    task: Name  # labelled file: .tsv .csv .jsonl, or .conll for entities; or a folder with train.*, test.*, dev.*
    models: tuple[Name, ...]  # Hub names or local folders; the first is what the others are compared with
    metric: Literal["auto", "accuracy", "macro_f1", "micro_f1"] = "auto"  # auto: accuracy, or micro F1 of entities
    general_text: Name | None = None  # file or folder of plain text, on which each model's perplexity is measured

    # --- task
    text_column: Name | None = None  # name of the text's column or JSON key; unset: found by its usual names
    pair_column: Name | None = None  # that of a second text, where two belong to one label
    label_column: Name | None = None  # that of the label
    test_fraction: Share = 0.2  # share of the texts that are tested on, where there is no test file
    dev_fraction: Share = 0.1  # share that chooses learning rate and epoch, where there is no dev file
    examples_per_class: tuple[str, ...] = ("10", "50", "all")  # training texts per class: a learning curve, or one size
    sen_max_length: Length = 128  # positions of a text: tokens, [CLS] and [SEP]; longer texts are truncated

    # --- fine-tuning
    frozen: bool = False  # linear probe: logistic regression on each model's features, and no fine-tuning
    num_seeds: Count = 6  # fine-tunings of each model; with fewer than 6 no difference can be told from chance
    num_epochs: Count = 4  # times the training texts are seen, at least
    min_steps: Count = 500  # optimizer steps at least, whatever num_epochs says: small data need more epochs
    batch_size: Count = 32  # texts per optimizer step
    learning_rates: tuple[Positive, ...] = (2e-5, 5e-5, 1e-4)  # peaks, each tried with the first seed; dev chooses
    seed: Seed = 42  # the first seed; decides splits, drawn texts, new heads, order and dropout

    # --- machine
    cuda_visible_devices: Devices = ""  # GPUs to use, such as "0" or "0,1"; empty: leave the environment alone
    mixed_precision: Precision = "auto"  # auto: the launcher's choice, else native

    # --- output
    path_model_save: Name = "output"  # receives downstream/NAME OF THE TASK/

    def __post_init__(self):
        """Raises UserError that names every field whose value, or combination of values, cannot work."""
        check_settings(self, _wrong_in_comparison(self))


def _wrong_in_training(config: Config) -> Iterator[str]:
    if config.scratch_size is not None and config.scratch_size not in SCRATCH_SIZES:
        yield f"initial_pretrain_model: no size {config.scratch_size!r}; choose scratch:{'|'.join(SCRATCH_SIZES)}"
    if config.initial_pretrain_tokenizer.startswith("scratch:"):
        yield "initial_pretrain_tokenizer: scratch: names a model; for a vocabulary learned from the text say corpus"
    prefix, colon, number = (config.add_words or "").partition(":")
    if prefix + colon == "auto:" and not 1 <= (config.automatic_words or 0) <= MOST_AUTOMATIC_WORDS:
        yield f"add_words: auto: takes a number from 1 to {MOST_AUTOMATIC_WORDS:,}, not {number!r}"
    if config.num_warmup_steps >= 1 and config.num_warmup_steps % 1:
        yield f"num_warmup_steps: must be a share below 1 or a whole number of steps, not {config.num_warmup_steps}"
    replaced = (config.mask_replace_prob, config.random_replace_prob)
    if not (min(replaced) >= 0 and max(replaced) <= 1 and sum(replaced) <= 1 + 1e-9):
        yield (
            "mask_replace_prob, random_replace_prob: must each be 0 or more and together at most 1, "
            f"not {replaced[0]} and {replaced[1]}"
        )
    for name in ("mlm_probability", "mlm_probability_end"):
        probability = getattr(config, name)
        if config.mask_span and (probability or 0) > 0.5:
            yield f"mask_span, {name}: spans cover at most 0.5 of the words, not {probability}"
    if config.replay_fraction and config.path_general is None:
        yield "replay_fraction, path_general: there is no general text to replay; name its folder"
    can_be_counted = 0 < config.replay_fraction < 1 <= config.batch_size < 2**31
    if can_be_counted and not 0 < config.general_chunks < config.batch_size:
        part = "all" if config.general_chunks else "none"
        yield f"replay_fraction, batch_size: {config.replay_fraction} of {config.batch_size} chunks, rounded, is {part}"
    if config.max_steps is not None and 0 < config.max_steps < config.num_warmup_steps:
        yield f"num_warmup_steps, max_steps: a warm-up of {config.num_warmup_steps} steps is longer than training"
    if config.early_stop_evals and config.schedule == "linear":
        yield (
            "early_stop_evals, schedule: linear decay lets the loss fall to its last step, wherever that is planned; "
            "to stop early set schedule to constant"
        )
    if config.mlm_probability_end is not None and config.schedule == "constant":
        yield (
            "mlm_probability_end, schedule: the probability moves until the last step, and with a constant learning "
            "rate that is open; choose one of them"
        )
    modes = [mode for mode in ("dry_run", "evaluate_only", "resume") if getattr(config, mode)]
    if len(modes) > 1:
        yield f"{', '.join(modes)}: choose one of them"
    if config.initial_pretrain_tokenizer == "corpus" and config.scratch_size is None:
        yield (
            "initial_pretrain_tokenizer: a vocabulary learned from the text (corpus) means nothing to the pre-trained "
            f"weights of initial_pretrain_model, {config.initial_pretrain_model}; give the model's own tokenizer, "
            "or train from scratch (scratch:small)"
        )


def _wrong_in_comparison(config: DownstreamConfig) -> Iterator[str]:
    if not config.test_fraction + config.dev_fraction < 1:
        yield "test_fraction, dev_fraction: together must be below 1, as the rest is trained on"
    if not config.learning_rates:
        yield "learning_rates: must be one or more"
    sizes = config.examples_per_class
    if not (sizes and all(size == "all" or (size.isdecimal() and 0 < int(size[:10]) < 2**31) for size in sizes)):
        yield f"examples_per_class: must be numbers of 1 or more, or all, not {' '.join(sizes)!r}"
    if len(set(sizes)) < len(sizes):
        yield "examples_per_class: each is to be named once"
    if not config.models:
        yield "models: name one or more, such as --models bert-base-uncased output/my_run/final"
    if len(set(map(normpath, config.models))) < len(config.models):
        yield "models: each is to be named once"


def demo_config() -> Config:
    """Returns the settings of `--demo`: a small BERT, trained from scratch in minutes on two CPU cores."""
    return replace(
        Config(),
        demo=True,
        initial_pretrain_model="scratch:tiny",
        initial_pretrain_tokenizer="corpus",
        num_epochs=8,
        learning_rate=3e-3,  # for this text, by Muon: benchmarks/RESULTS.md, "The recipe"
    )


def defaults_of(config: Config) -> Config:
    """Returns the settings that hold where nothing but `--demo`, if that is set, is given."""
    return replace(demo_config(), demo=False) if config.demo else Config()


def parse_flags(arguments: list[str] | None = None) -> Config:
    """Returns the configuration by Config.py's defaults and the command line's flags (None: sys.argv). `--help` and
    unknown or ill-typed flags are answered by tyro, with exit status 0 and 2. Raises UserError."""
    arguments = sys.argv[1:] if arguments is None else arguments
    default = demo_config() if "--demo" in arguments or Config.demo else Config()
    return parse_settings(Config, "train.py", arguments, default)


def parse_downstream_flags(arguments: list[str] | None = None) -> DownstreamConfig:
    """Returns downstream.py's configuration, as `parse_flags` does train.py's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for old, new in RENAMED_FLAGS.items():
        flag = f"^--{old.replace('_', '[_-]')}(?==|$)"
        arguments = [re.sub(flag, f"--{new}", argument) for argument in arguments]
    return parse_settings(DownstreamConfig, "downstream.py", arguments)
