"""A comparison: models as candidates for one task, and what is built once for all of them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from Config import DownstreamConfig
from mlm.downstream.encoding import Encoded
from mlm.downstream.metrics import count_answers, metrics_of
from mlm.downstream.task import Task
from mlm.downstream.trials import Trials

NOT_THE_MODELS = ("_name_or_path", "transformers_version", "architectures", "dtype")  # of a config


@dataclass(eq=False)
class Candidate:
    """A model to be compared."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str  # of weights and tokenizer
    head_size: int  # of attention
    dev: Encoded
    test: Encoded
    read_before: int | None  # test texts that it was pre-trained on, as far as that can be seen


@dataclass(eq=False)
class Comparison:
    """What is built once, and kept to the end."""

    config: DownstreamConfig
    accelerator: Accelerator
    folder: Path
    task: Task
    metric: str  # that models, and weights in training, are compared by
    candidates: dict[str, Candidate]
    trials: Trials
    general_lines: list[str]  # of general_text

    def sep_id(self, candidate: Candidate) -> int | None:
        """What separates two texts, where the task has pairs."""
        return candidate.tokenizer.sep_token_id if self.task.kind == "pair" else None

    def score_on_dev(self, answers: list[int]) -> float:
        metric = metrics_of(self.task)[self.metric]
        return float(metric(count_answers(self.task, answers, self.task.dev).sum(0)))


def fingerprint(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of a model's weights, config and tokenizer, so that a changed model is not taken for what it was."""
    config = {name: value for name, value in encoder.config.to_dict().items() if name not in NOT_THE_MODELS}
    state = hashlib.blake2b(repr(sorted(config.items())).encode(), digest_size=16)
    state.update(tokenizer.backend_tokenizer.to_str().encode())
    for name, weight in encoder.state_dict().items():
        state.update(name.encode())
        state.update(weight.contiguous().cpu().numpy())
    return state.hexdigest()
