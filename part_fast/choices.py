"""Tables of names, as help texts list them and as an unknown name is refused.

A table is a mapping from a name to a row; a row is a line of help, or has one as its `help`. In a name capitals stand
for what the user writes: wrn-DEPTH-WIDTH is wrn-34-10.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from part_fast.errors import BadValueError


def either(names: Iterable[str]) -> str:
    """The names as a sentence has them: "pgd, mma or aa"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def described(table: Mapping[str, Any]) -> str:
    """Each name with its row's line of help, where it has one: "pgd (several steps), mma (minimum margin) or aa"."""
    lines = {name: row if isinstance(row, str) else row.help for name, row in table.items()}
    return either(f"{name} ({line})" if line else name for name, line in lines.items())


def check_choice(argument: str, value: str, known: Iterable[str]) -> str:
    """`value` if it is one of the known names. Errors: ValueError that names the argument and lists them."""
    known = tuple(known)
    if value not in known:
        raise BadValueError(f"{argument} must be one of {', '.join(known)}, got {value!r}")
    return value
