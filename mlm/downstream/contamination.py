"""Has a model read the test texts before? A look at the pre-training text of the run that it came from."""

import json
from pathlib import Path

from Config import Config
from mlm.data.text_files import find_text
from mlm.downstream.task import Task
from mlm.errors import UserError
from mlm.runtime.hub import wants_wikitext


def count_read_before(model: str, task: Task) -> int | None:
    """How many test examples have a text that is a line of the text that `model`, of a run of train.py's, was trained
    on; None where there is no such run or text to see. Only letters and digits are compared, and only whole lines.
    """
    settings = Path(model).resolve().parent / "settings.json"
    try:
        saved = json.loads(settings.read_text(encoding="utf-8"))["settings"]
        config = Config(**{name: value for name, value in saved.items() if name in Config.__dataclass_fields__})
        if config.demo or wants_wikitext(config):  # text that is made or fetched, which is not to be done for this
            return None
        lines = {_letters(line) for line in find_text(config).train()}
    except (OSError, AttributeError, KeyError, TypeError, ValueError, UserError):  # no run, or its text has gone
        return None
    texts = [[" ".join(example.parts)] if task.kind == "entities" else example.parts for example in task.test]
    return sum(any(_letters(text) in lines for text in of_example) for of_example in texts)


def _letters(text: str) -> int:
    """A text's letters and digits, as a number that stands for them."""
    return hash("".join(filter(str.isalnum, text.casefold())))
