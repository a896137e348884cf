"""A comparison: models as candidates for one task, and the state that they share."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from Config import DownstreamConfig
from mlm.downstream.encoding import Encoded
from mlm.downstream.metrics import count_predictions, task_metrics
from mlm.downstream.task import Task
from mlm.downstream.trials import Trials

IGNORED_IN_CONFIG = ("_name_or_path", "transformers_version", "architectures", "dtype")  # that change no output


@dataclass(eq=False)
class Candidate:
    """A model to be compared."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str  # of weights and tokenizer
    head_size: int  # of attention
    dev: Encoded
    test: Encoded
    contaminated: int | None  # test texts that it was pre-trained on, as far as that can be seen
    features: dict[str, np.ndarray] = field(default_factory=dict)  # of each split, for a linear probe: made once


@dataclass(eq=False)
class Comparison:
    """The models, the task and the trials, built once and kept to the end."""

    config: DownstreamConfig
    accelerator: Accelerator
    folder: Path
    task: Task
    metric: str  # that models, and weights in training, are compared by
    candidates: dict[str, Candidate]
    trials: Trials
    general_lines: list[str]  # of general_text

    def sep_id(self, candidate: Candidate) -> int | None:
        """Returns the token that separates two texts, where the task has pairs."""
        return candidate.tokenizer.sep_token_id if self.task.kind == "pair" else None

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
