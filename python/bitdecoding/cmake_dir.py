"""`bitdecoding cmake-dir`: where find_package finds the library: `cmake -Dbitdecoding_DIR=$(bitdecoding cmake-dir)`."""

from __future__ import annotations

import argparse

from .cute_kernels import native


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    print(native.LIBRARY_PATH.parent / "cmake" / "bitdecoding")
    return 0
