"""The templates of pages, model card and screens, by jinja2: what is put into a page is escaped."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from tqdm import tqdm

from mlm.terminal import size

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
)
_ENVIRONMENT.filters |= {"commas": "{:,}".format, "clock": tqdm.format_interval, "bytes": size}


def render(template: str, **values: Any) -> str:
    """Returns the text of a template, by its file here, with the values put in."""
    return _ENVIRONMENT.get_template(template).render(values)
