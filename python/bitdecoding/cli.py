"""The command line. Each command is a module with ``add_arguments(parser)`` and ``run(args) -> exit status``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from .cute_kernels.errors import BitDecodingError, InvalidArgument

# name -> (module, what it does); a module is imported when its command is used
COMMANDS = {
    "info": ("info", "what is installed, and what this machine's GPU needs"),
    "demo": ("demo", "a real model on a real text with 16-bit and low-bit caches"),
    "tune": ("tune", "finds the fastest kernels for this GPU, which decode then uses"),
    "cmake-dir": ("cmake_dir", "where CMake finds the C++ library"),
    "eval": ("evaluate", "quality of policies against the 16-bit cache, on small real models"),
    "bench-model": ("bench_model", "a whole model's decode step with 16-bit and low-bit caches, against its floor"),
    "bench": ("bench", "times decode against torch SDPA, FlashInfer and the read bandwidth"),
}
EXTRAS = {"bench": "bench"}  # what to install for a command; the others need what the demo needs
USAGE_ERROR = 2


class _Parser(argparse.ArgumentParser):
    """One whose errors are the library's."""

    def error(self, message: str) -> NoReturn:
        raise InvalidArgument(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors of arguments, of the library and of files are one line on stderr and exit status 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(prog="bitdecoding", description="Decode attention over a low-bit KV cache.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        if argv[:1] == [name]:
            try:
                loaded = importlib.import_module(f".{module}", __package__)
            except ModuleNotFoundError as error:
                extra = EXTRAS.get(name, "demo")
                print(f"bitdecoding {name}: needs {error.name}; pip install '.[{extra}]'", file=sys.stderr)
                return USAGE_ERROR
            loaded.add_arguments(command)
            command.set_defaults(run=loaded.run)
    try:
        args = parser.parse_args(argv)
        return args.run(args)
    except (BitDecodingError, OSError) as error:
        print(f"{' '.join(['bitdecoding', *argv[:1]])}: {error}", file=sys.stderr)
        return USAGE_ERROR
