"""Has a model read the test texts before? A look at the pre-training text of the run that it came from."""

import json
from pathlib import Path

from Config import Config
from mlm.errors import UserError
from mlm.hub import wants_wikitext
from mlm.labelled import Example
from mlm.text import find_text


def count_read_before(model: str, examples: list[Example]) -> int | None:
    """How many of the examples' texts are lines of the text that `model`, a folder of a run of train.py's, was trained
    on; None where there is no such run or text to see. Only letters and digits are compared, and only whole lines.
    """
    settings = Path(model).resolve().parent / "settings.json"
    try:
        saved = json.loads(settings.read_text(encoding="utf-8"))["settings"]
        config = Config(**{name: value for name, value in saved.items() if name in Config.__dataclass_fields__})
        if wants_wikitext(config):  # which is not here any more, and not to be fetched for this
            return None
        lines = {_letters(line) for line in find_text(config).train()}
    except (OSError, KeyError, TypeError, ValueError, UserError):  # no run, or its text has gone
        return None
    return sum(_letters(" ".join(example.parts)) in lines for example in examples)


def _letters(text: str) -> int:
    """A text's letters and digits, as a number that stands for them."""
    return hash("".join(filter(str.isalnum, text.casefold())))
