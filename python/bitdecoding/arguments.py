"""Arguments of the commands, checked before anything is loaded or measured. Errors name the option and the value."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch

from . import ops
from .cute_kernels.checks import INT32_MAX
from .cute_kernels.errors import InvalidArgument
from .quantization import preset

MAX_BATCH = 1 << 15  # of an append
MAX_SEED = 2**63 - 1  # of torch

Number = TypeVar("Number", int, float)
Value = TypeVar("Value")


def integers(least: int, most: int = INT32_MAX) -> Callable[[str], int]:
    """An argparse type."""
    return _numbers(int, lambda x: least <= x <= most, f"integers from {least} to {most}")


def _numbers(parse: Callable[[str], Number], sound: Callable[[Number], bool], allowed: str) -> Callable[[str], Number]:
    def convert(text: str) -> Number:
        try:
            if sound(value := parse(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are {allowed}")

    return convert


positive = _numbers(float, lambda x: 0 < x < math.inf, "finite numbers above 0")
not_negative = _numbers(float, lambda x: 0 <= x < math.inf, "finite numbers from 0")


def parsed(option: str, text: str, parse: Callable[[str], Value]) -> Value:
    """What an option's text stands for; its errors get the option's name."""
    try:
        return parse(text)
    except (InvalidArgument, OSError) as error:
        raise InvalidArgument(f"{option} {text}: {error}") from None


def check_presets(option: str, names: Iterable[str], head_dim: int = 128) -> None:
    for name in names:
        parsed(option, name, lambda name: preset(name, head_dim))


def device_of(name: str | None) -> torch.device:
    """The device of --device; None: the GPU if there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return ops.check_device("--device", default if name is None else name)


def make_folder(option: str, folder: Path, given: Path | None = None) -> None:
    """For a command's results. given: what the option says, if not the folder."""
    given = given or folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(f"{option} {given}: no folder can be there: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise InvalidArgument(f"{option} {given}: cannot be written to")


def check_output(option: str, file: Path) -> None:
    """A file to be written, whose folder is made."""
    make_folder(option, file.parent, file)
    if file.is_dir() or (file.exists() and not os.access(file, os.W_OK)):
        raise InvalidArgument(f"{option} {file}: cannot be written: allowed are files, there or not")


def read_text(option: str, file: Path) -> str:
    """A UTF-8 text file."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidArgument(f"{option} {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{option} {file}: is not UTF-8: {error}") from None
