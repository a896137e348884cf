"""What the user can put right: one kind of error, and how it is told."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can put right. Its text is all they see: what is wrong, where, and what to do."""


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turns an error that the user can put right into its text on the terminal and exit status 2."""
    try:
        yield
    except (UserError, OSError) as error:  # OSError: a file that cannot be read, a folder that cannot be made
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def optional(what: str) -> Iterator[None]:
    """Turns an error of work that the result does not depend on into a line on the terminal: `what` failed, and why."""
    try:
        yield
    except Exception as error:  # whatever it is, it costs no more than this
        print(f"warning: {what} failed: {first_line(error) or type(error).__name__}", file=sys.stderr)


def first_line(error: Exception) -> str:
    """Returns the first line of an error's text, which is all that fits into a sentence."""
    return str(error).partition("\n")[0]
