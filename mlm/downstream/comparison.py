"""A comparison: models as candidates for one task, and the state that they share."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from Config import DownstreamConfig
from mlm.data.micro_batches import MicroBatcher
from mlm.downstream.encoding import Encoded
from mlm.downstream.metrics import count_predictions, task_metrics
from mlm.downstream.task import Task

IGNORED_IN_CONFIG = ("_name_or_path", "transformers_version", "architectures", "dtype")  # that change no output


@dataclass(eq=False)
class Candidate:
    """A model to be compared."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    cache_key: str  # a digest of all that decides its results beside what Trial says
    micro_batcher: MicroBatcher  # splits its texts where nothing is trained
    sep_id: int | None  # the token that separates two texts, where the task has pairs
    dev: Encoded
    test: Encoded
    contaminated: int | None  # test texts that it was pre-trained on, as far as that can be seen
    warnings: list[str]  # about its weights and its tokenizer
    features: dict[str, np.ndarray] = field(default_factory=dict)  # of each split, for a linear probe: made once


@dataclass(eq=False)
class Comparison:
    """The models and the task, built once and kept to the end."""

    config: DownstreamConfig
    accelerator: Accelerator
    folder: Path
    task: Task
    metric: str  # that models, and weights in training, are compared by
    general_lines: list[str]  # of general_text
    candidates: dict[str, Candidate] = field(default_factory=dict)  # by name

    def score_on_dev(self, predictions: list[int]) -> float:
        metric = task_metrics(self.task)[self.metric]
        return float(metric(count_predictions(self.task, predictions, self.task.dev).sum(0)))


def fingerprint(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a digest of a model's weights, config and tokenizer, which changes with any of them."""
    config = {name: value for name, value in encoder.config.to_dict().items() if name not in IGNORED_IN_CONFIG}
    state = hashlib.blake2b(repr(sorted(config.items())).encode(), digest_size=16)
    state.update(tokenizer.backend_tokenizer.to_str().encode())
    for name, weight in encoder.state_dict().items():
        state.update(name.encode())
        state.update(weight.contiguous().cpu().numpy())
    return state.hexdigest()
