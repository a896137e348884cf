"""Trials of a comparison: each a fine-tuning of one model with one seed, each a file, so that none is done twice.

Several processes may be at work on one comparison; each takes trials that no other has taken.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from filelock import Timeout
from torch import nn
from transformers import PreTrainedTokenizerBase

from mlm.storage import digest, lock, write_json

FORMAT = 1  # raise when trials are done in another way


class Trial(NamedTuple):
    """What is to be done."""

    model: str
    size: str  # of examples_per_class
    seed: int
    learning_rate: float  # 0 where features are frozen


@dataclass
class Result:
    """What came of a trial."""

    model: str
    size: str
    seed: int
    setting: float  # the learning rate; for frozen features logistic regression's C
    steps: int  # after which dev was best; 0 for frozen features
    dev_score: float
    seconds: float
    answers: list[int]  # the class of each test text, or of each word


class Trials:
    """The files of trials in a folder, named by all that decides them."""

    def __init__(self, folder: Path, decided_by: dict[str, str]):
        """decided_by: for each model, a digest of all that decides its trials beside what Trial says."""
        self._folder, self._decided_by = folder, decided_by

    def path(self, trial: Trial) -> Path:
        return self._folder / f"{digest(FORMAT, trial[1:], self._decided_by[trial.model])}.json"

    def read(self, trial: Trial) -> Result:
        """The result, under the name by which the model is called now."""
        content = json.loads(self.path(trial).read_text(encoding="utf-8"))
        return Result(**content | {"model": trial.model})

    def do(
        self, trials: list[Trial], do: Callable[[Trial], Result], tell: Callable[[Result, int], None]
    ) -> list[Result]:
        """The results of the trials, by `do` where they are not there yet; each is told, with how many are left."""
        for patience_s in (0, -1):  # first those that nobody is at work on; then, where others failed, the rest
            for trial in trials:
                path = self.path(trial)
                try:
                    with lock(path.with_suffix(".lock"), patience_s):
                        if not path.exists():
                            result = do(trial)
                            write_json(path, asdict(result))
                            tell(result, sum(not self.path(other).exists() for other in trials))
                except Timeout:
                    continue
        return [self.read(trial) for trial in trials]


def fingerprint(encoder: nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of a model's weights and its tokenizer, so that a changed model is not taken for what it was."""
    state = hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=16)
    for name, weight in encoder.state_dict().items():
        state.update(name.encode())
        state.update(weight.contiguous().cpu().numpy())
    return state.hexdigest()
