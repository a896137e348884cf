"""What any dataclass of settings shares: the check of its fields' types, its flags, its description."""

import re
import shlex
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from os.path import expanduser
from typing import Any, Literal, TypeVar

from mlm.errors import UserError

Settings = TypeVar("Settings")


def check_settings(settings: Any, wrong_values: Callable[[], Iterable[str]]) -> None:
    """Raises UserError that names every field of a dataclass whose type is wrong; if none is, all of `wrong_values()`.

    A problem is a line "field: what is wrong", or "field, other field: what is wrong". A path that begins with ~/ comes
    to lie in the user's home: the shell does not see to it behind an equals sign, nor in Config.py.
    """
    for field in fields(settings):
        value = getattr(settings, field.name)
        setattr(settings, field.name, tuple(map(_at_home, value)) if type(value) is tuple else _at_home(value))
    problems = list(_wrong_types(settings)) or list(wrong_values())
    if problems:
        raise UserError("\n".join(problems))


def _at_home(value):
    return expanduser(value) if type(value) is str and value.startswith("~/") else value


def _wrong_types(settings):
    """Yields a problem for each field whose value does not have the annotated type."""
    hints = typing.get_type_hints(type(settings))
    for field in fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if typing.get_origin(hint) is Literal:
            valid = value in typing.get_args(hint)
            rule = f"one of {', '.join(typing.get_args(hint))}"
        elif typing.get_origin(hint) is tuple:  # of any length
            kind = typing.get_args(hint)[0]
            valid = type(value) is tuple and all(_has_type(part, (kind,)) for part in value)
            rule = f"a tuple of {kind.__name__}"
        else:
            kinds = typing.get_args(hint) or (hint,)
            valid = _has_type(value, kinds)
            rule = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        if not valid:
            yield f"{field.name}: must be {rule}, not {type(value).__name__} {value!r}"


def _has_type(value, kinds):
    return type(value) in kinds or (type(value) is int and float in kinds)  # but True is not a number


def require(settings: Any, allowed: Callable[[Any], bool], rule: str, *names: str) -> Iterator[str]:
    """Yields a problem for each named field that is set, and whose value is not allowed.

    `allowed` is to be written so that NaN is refused: as what must be true, not as what must not be.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not allowed(value):
            yield f"{name}: must be {rule}, not {value}"


def parse_settings(
    kind: type[Settings],
    program: str,
    arguments: list[str],
    default: Settings | None = None,
    renamed: Mapping[str, str] | None = None,
) -> Settings:
    """Returns settings of a class, from flags named as its fields, whose comments are the help.

    default: what holds where a flag is not given; None: the class's own defaults, and fields without one are required.
    renamed: from flags of former versions, which still work, to those of today.
    `--help` and unknown or ill-typed flags are answered by tyro, with exit status 0 and 2.
    """
    import tyro  # here, so that whoever builds settings in code does without it

    for old, new in (renamed or {}).items():
        flag = f"^--{old.replace('_', '[_-]')}(?==|$)"
        arguments = [re.sub(flag, f"--{new}", argument) for argument in arguments]
    of_default: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(kind, prog=program, args=arguments, use_underscores=True, **of_default)


def repeat_command(program: str, settings: Any, default: Any, without: Iterable[str] = ()) -> str:
    """Returns the command that gives a program these settings, where its defaults are `default`.

    without: settings that are not to be repeated.
    """
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
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        rows.append((f" {star} {field.name}", "unset" if shown is None or shown == "" else str(shown)))
    return table(rows, "<<")
