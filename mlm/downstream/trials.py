"""Trials: each a fine-tuning of one model with one seed, each kept in a file, so that none is done twice.

Several processes may work on one comparison; each takes trials that no other has taken.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from filelock import Timeout

from mlm.storage import digest, lock, write_json

FORMAT = 2  # raise when trials are done, or written, in another way


class Trial(NamedTuple):
    """A fine-tuning, or a linear probe, to be done."""

    model: str
    size: str  # of examples_per_class
    seed: int
    learning_rate: float | None  # None for a linear probe


@dataclass
class Result:
    """A trial that was done."""

    model: str
    size: str
    seed: int
    learning_rate: float | None  # None for a linear probe
    regularization_c: float | None  # of a linear probe's logistic regression
    best_step: int | None  # after which dev was best; 0: it diverged before, and the head is as it was drawn
    dev_score: float
    seconds: float
    predictions: list[int]  # the class id of each test text, or of each word


class Trials:
    """The files of trials in a folder."""

    def __init__(self, folder: Path, cache_keys: dict[str, str], num_predictions: dict[str, int], num_classes: int):
        """Takes, for each model, a digest of all that decides its results beside what Trial says, and the number of
        predictions on the test; and the number of classes."""
        self._folder = folder
        self._cache_keys = cache_keys
        self._num_predictions = num_predictions
        self._num_classes = num_classes

    def read(self, trial: Trial) -> Result | None:
        """Returns the result, under the model's present name; None where there is none, or it is damaged."""
        try:
            content = json.loads(self._path(trial).read_text(encoding="utf-8"))
            result = Result(**content | {"model": trial.model})
            valid = all(type(number) is int and 0 <= number < self._num_classes for number in result.predictions)
            return result if valid and len(result.predictions) == self._num_predictions[trial.model] else None
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def run(
        self, trials: list[Trial], run_trial: Callable[[Trial], Result], report: Callable[[Result, int], None]
    ) -> list[Result]:
        """Returns the results of the trials, done by `run_trial` where there is none yet.

        report: called with each new result and the number of trials that are left. Trials that other processes are at
        work on come last; once these have done them, or ended, their results are read, or they are done here.
        """

        def finish(trial: Trial, timeout_s: float) -> Result:
            path = self._path(trial)
            with lock(path.with_suffix(".lock"), timeout_s):
                result = self.read(trial)
                if result is None:
                    result = run_trial(trial)
                    write_json(path, asdict(result))
                    report(result, sum(not self._path(other).exists() for other in trials))
                return result

        results, taken = {}, []
        for trial in trials:
            try:
                results[trial] = finish(trial, timeout_s=0)
            except Timeout:  # another process holds it
                taken.append(trial)
        for trial in taken:
            results[trial] = finish(trial, timeout_s=-1)
        return [results[trial] for trial in trials]

    def _path(self, trial: Trial) -> Path:
        return self._folder / f"{digest(FORMAT, trial[1:], self._cache_keys[trial.model])}.json"
