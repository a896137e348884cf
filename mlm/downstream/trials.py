"""A comparison and its trials: each a fine-tuning of one model with one seed, each a file, so that none is done twice.

Several processes may be at work on one comparison; each takes trials that no other has taken.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from filelock import Timeout

from mlm.storage import digest, lock, write_json

FORMAT = 1  # raise when trials are done in another way


class Trial(NamedTuple):
    """What is to be done."""

    model: str
    size: str  # of examples_per_class
    seed: int
    learning_rate: float | None  # None where features are frozen


@dataclass
class Result:
    """What came of a trial."""

    model: str
    size: str
    seed: int
    learning_rate: float | None  # None where features are frozen
    penalty: float | None  # logistic regression's C, for frozen features
    best_step: int | None  # after which dev was best; 0: it diverged before, and the head is as it was drawn
    dev_score: float
    seconds: float
    answers: list[int]  # the class of each test text, or of each word


class Trials:
    """The files of trials in a folder, named by all that decides them."""

    def __init__(self, folder: Path, decided_by: dict[str, str], answers: dict[str, int], classes: int):
        """decided_by: for each model, a digest of all that decides its trials beside what Trial says; answers: how many
        a model gives on the test, each one of so many classes."""
        self._folder, self._decided_by, self._answers, self._classes = folder, decided_by, answers, classes

    def read(self, trial: Trial) -> Result | None:
        """The result, under the name by which the model is called now; None where there is none, or it is damaged."""
        try:
            content = json.loads(self._path(trial).read_text(encoding="utf-8"))
            result = Result(**content | {"model": trial.model})
            are_classes = all(type(answer) is int and 0 <= answer < self._classes for answer in result.answers)
            return result if are_classes and len(result.answers) == self._answers[trial.model] else None
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def do(
        self, trials: list[Trial], do: Callable[[Trial], Result], tell: Callable[[Result, int], None]
    ) -> list[Result]:
        """The results of the trials, by `do` where they are not there yet; each is told, with how many are left."""
        results: dict[Trial, Result] = {}
        for patience_s in (0, -1):  # first those that nobody is at work on, then those that others have done or left
            for trial in trials:
                if trial in results:
                    continue
                try:
                    with lock(self._path(trial).with_suffix(".lock"), patience_s):
                        result = self.read(trial)
                        if result is None:
                            result = do(trial)
                            write_json(self._path(trial), asdict(result))
                            tell(result, sum(not self._path(other).exists() for other in trials))
                        results[trial] = result
                except Timeout:
                    continue
        return [results[trial] for trial in trials]

    def _path(self, trial: Trial) -> Path:
        return self._folder / f"{digest(FORMAT, trial[1:], self._decided_by[trial.model])}.json"
