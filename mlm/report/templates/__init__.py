"""The templates of pages, model card and dry run, by jinja2: what is put into a page is escaped."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, select_autoescape
from tqdm import tqdm

from mlm.terminal import size

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
)
_ENVIRONMENT.filters |= {"commas": "{:,}".format, "clock": tqdm.format_interval, "bytes": size}


def template(name: str) -> Template:
    """Returns the template of that file here."""
    return _ENVIRONMENT.get_template(name)
