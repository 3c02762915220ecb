"""Checks of arguments, one per kind. Each raises InvalidArgument with the argument, its value and what is allowed."""

from __future__ import annotations

import json
import os
from typing import Any

from .errors import InvalidArgument

INT32_MAX = 2**31 - 1
SHOWN_CHARACTERS = 80  # of a value


def shown(value: object) -> str:
    """A value on one line, as a message shows it."""
    text = ascii(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


def check_int(name: str, value: object, least: int = 0, most: int = INT32_MAX) -> None:
    """A size or a number of things; no bool."""
    if type(value) is not int or not least <= value <= most:
        bound = "2^31 - 1" if most == INT32_MAX else most
        raise InvalidArgument(f"{name}={shown(value)}: allowed are integers from {least} to {bound}")


def check_one_of(name: str, value: object, allowed: tuple) -> None:
    """One of some values, and of its type: True is not 1, 128.0 not 128."""
    if not any(type(value) is type(each) and value == each for each in allowed):
        raise InvalidArgument(f"{name}={shown(value)}: allowed are {', '.join(map(repr, allowed))}")


def check_type(name: str, value: object, *types: type | None) -> None:
    """An object of one of the types; None stands for itself."""
    for each in types:
        if value is None if each is None else isinstance(value, each):
            return
    names = " or ".join("None" if each is None else each.__name__ for each in types)
    raise InvalidArgument(f"{name}={shown(value)}: allowed is {names}, not {type(value).__name__}")


def check_path(name: str, value: object) -> None:
    """A file or folder, there or not."""
    if not isinstance(value, str | os.PathLike):
        raise InvalidArgument(f"{name}={shown(value)}: allowed is a path, as str or os.PathLike")


def parse_json(name: str, text: Any) -> Any:
    """The plain values of a JSON text."""
    check_type(name, text, str, bytes)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also of numbers too long, and of what is not UTF-8
        raise InvalidArgument(f"{name}={shown(text)}: not JSON: {error}") from None
