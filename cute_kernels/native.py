"""The compiled module: finds and loads ``libbitdecoding_ffi.so`` and hands out its functions.

The library is looked for in $BITDECODING_LIBRARY (a file; set while building), then in ``lib/`` beside the package.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tvm_ffi

from . import errors

_LIBRARY = "libbitdecoding_ffi.so"
NO_WINDOW = 2**31 - 1  # the window of a decode without one, see DecodeParams


def _find_library() -> Path:
    if given := os.environ.get("BITDECODING_LIBRARY"):
        return Path(given)
    # an editable install has its Python files elsewhere than its libraries; the package's path names both places
    package = sys.modules[(__package__ or "").partition(".")[0]]
    for folder in package.__path__:
        if (path := Path(folder) / "lib" / _LIBRARY).is_file():
            return path
    raise ImportError(
        f"{_LIBRARY} is not beside the package; install it with `pip install .`, or set BITDECODING_LIBRARY"
    )


LIBRARY_PATH = _find_library()
PACKS_DIR = LIBRARY_PATH.parent / "packs"

# Names that the library throws; see raise_unless_ok in runtime/binding.cpp
for _error in (
    errors.InvalidArgument,
    errors.UnsupportedConfig,
    errors.KernelNotFound,
    errors.CudaError,
    errors.CacheFormatError,
):
    tvm_ffi.register_error(_error.__name__, _error)

_handle = ctypes.CDLL(str(LIBRARY_PATH))  # registers its classes and functions with tvm-ffi; stays loaded


def function(name: str) -> Callable[..., Any]:
    """A function of the library, by its name without the ``bitdecoding.`` prefix."""
    return tvm_ffi.get_global_func(f"bitdecoding.{name}")
