"""Contamination: test texts that a model was pre-trained on, as far as the text of its run can be seen."""

import json
from functools import cache
from pathlib import Path

from Config import Config
from mlm.downstream.task import Task
from mlm.errors import UserError
from mlm.runtime.hub import wants_wikitext
from mlm.text.files import find_text


def count_contaminated(model: str, task: Task) -> int | None:
    """Returns how many test examples have a text that is a line of the run's training text.

    Only whole lines are compared, by their letters and digits. None where the model is of no run, or the text that it
    was trained on has gone.
    """
    texts = [[" ".join(example.parts)] if task.kind == "entities" else example.parts for example in task.test]
    wanted = frozenset(_letters(part) for parts in texts for part in parts)
    found = _find_in_training_text(Path(model).resolve().parent / "settings.json", wanted)
    return None if found is None else sum(any(_letters(part) in found for part in parts) for parts in texts)


@cache  # final/ and best/ are of one run
def _find_in_training_text(settings: Path, wanted: frozenset[str]) -> frozenset[str] | None:
    """Returns which of the wanted texts stand in a run's training text, read a line at a time; None as above."""
    try:
        saved = json.loads(settings.read_text(encoding="utf-8"))
        known = saved["settings"].items()
        config = Config(**{name: value for name, value in known if name in Config.__dataclass_fields__})
        if config.demo or wants_wikitext(config):  # text that is made or fetched, which is not to be done for this
            return None
        text = find_text(config)
        if text.digest != saved["text_digest"]:  # another text lies there now
            return None
        return wanted.intersection(map(_letters, text.train()))
    except (OSError, AttributeError, KeyError, TypeError, ValueError, UserError):
        return None


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))
