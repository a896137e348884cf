"""The templates of the pages and of the model card, by jinja2: what is put into a page is escaped."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, select_autoescape

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
)


def template(name: str) -> Template:
    """The template of that file here."""
    return _ENVIRONMENT.get_template(name)
