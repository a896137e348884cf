"""Contamination: test texts that a model was pre-trained on, as far as the text of its run can be seen."""

import json
from pathlib import Path

from Config import Config
from mlm.data.text_files import find_text
from mlm.downstream.task import Task
from mlm.errors import UserError
from mlm.runtime.hub import wants_wikitext


def count_contaminated(model: str, task: Task) -> int | None:
    """Returns how many test examples have a text that is a line of the run's training text.

    Only whole lines are compared, by their letters and digits. None where the model is of no run, or its text has gone.
    """
    settings = Path(model).resolve().parent / "settings.json"
    try:
        saved = json.loads(settings.read_text(encoding="utf-8"))["settings"]
        config = Config(**{name: value for name, value in saved.items() if name in Config.__dataclass_fields__})
        if config.demo or wants_wikitext(config):  # text that is made or fetched, which is not to be done for this
            return None
        lines = {_hash_letters(line) for line in find_text(config).train()}
    except (OSError, AttributeError, KeyError, TypeError, ValueError, UserError):
        return None
    texts = [[" ".join(example.parts)] if task.kind == "entities" else example.parts for example in task.test]
    return sum(any(_hash_letters(part) in lines for part in parts) for parts in texts)


def _hash_letters(text: str) -> int:
    return hash("".join(filter(str.isalnum, text.casefold())))
