"""What any dataclass of settings shares: the check of its fields' types, its flags, its description."""

import shlex
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import cache
from os.path import expanduser
from typing import Any, TypeVar

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError

from mlm.errors import UserError

Settings = TypeVar("Settings")


def must(rule: str, allows: Callable[[Any], bool]) -> AfterValidator:
    """Returns what a field's annotation says of its values beside their type: that they must `rule`."""

    def check(value):
        if not allows(value):
            raise ValueError(f"must {rule}")
        return value

    return AfterValidator(check)


def check_settings(settings: Any, wrong_together: Iterator[str]) -> None:
    """Raises UserError that names every field of a dataclass whose value is not what its annotation says, and, where
    all have the annotated types, all that is wrong beside.

    A path that begins with ~/ comes to lie in the user's home: the shell does not see to it behind an equals sign, nor
    in Config.py. wrong_together: yields lines "field: what is wrong", or "field, other field: what is wrong".
    """
    problems, have_their_types = [], True
    for name, hint in typing.get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        setattr(settings, name, tuple(map(_at_home, value)) if type(value) is tuple else _at_home(value))
        try:
            _validator(hint).validate_python(getattr(settings, name))
        except ValidationError as error:
            wrong = error.errors()[0]
            what = wrong["msg"].removeprefix("Value error, ").replace("Input should", "must")
            problems.append(f"{name}: {what}, not {wrong['input']!r}")
            have_their_types &= not wrong["type"].endswith("_type")
    if have_their_types:
        problems += wrong_together
    if problems:
        raise UserError("\n".join(problems))


def _at_home(value):
    return expanduser(value) if type(value) is str and value.startswith("~/") else value


@cache
def _validator(hint: Any) -> TypeAdapter:
    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))


def parse_settings(
    kind: type[Settings], program: str, arguments: list[str], default: Settings | None = None
) -> Settings:
    """Returns settings of a class, from flags named as its fields, whose comments are the help.

    default: what holds where a flag is not given; None: the class's own defaults, and fields without one are required.
    `--help` and unknown or ill-typed flags are answered by tyro, with exit status 0 and 2.
    """
    import tyro  # here, so that whoever builds settings in code does without it

    of_default: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(kind, prog=program, args=arguments, use_underscores=True, **of_default)


def repeat_command(program: str, settings: Any, default: Any, without: Iterable[str]) -> str:
    """Returns the command that gives a program these settings, but those of `without`; its defaults are `default`."""
    flags = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in without or value == getattr(default, field.name) or value is None or value is False:
            continue
        flags.append(f"--{field.name}" if value is True else f"--{field.name} {shlex.quote(str(value))}")
    return " ".join(["python", program, *flags])


def describe_settings(settings: Any, given: Any) -> str:
    """Returns the settings, one per line; starred where `given`, of the same class, differs from the defaults."""
    from mlm.terminal import table  # here, so that whoever builds settings in code does without torch

    rows = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        star = " " if getattr(given, field.name) == field.default else "*"
        rows.append((f" {star} {field.name}", "unset" if value is None or value == "" else str(value)))
    return table(rows, "<<")
