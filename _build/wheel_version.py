"""The version: that of the sources, and for a wheel with kernels what they were compiled for (0.1.0+cu12.sm90a)."""

import os
from collections.abc import Mapping
from typing import Any

BASE = "0.1.0"
ARCHS = ("sm80", "sm86", "sm89", "sm90a", "sm100", "sm120")
TOOLKITS = ("cu12", "cu13")  # the first is the default: drivers for CUDA 13 run its kernels too


class Version:
    """A provider of scikit-build-core's dynamic metadata."""

    def __init__(self) -> None:
        self._state = ""

    def build_state(self, state: str) -> None:
        self._state = state

    def dynamic_metadata(self, settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, str]:
        archs = [arch for arch in os.environ.get("BITDECODING_ARCH", "").split(",") if arch not in ("", "cpu")]
        if not archs or self._state == "sdist":
            return {"version": BASE}
        return {"version": f"{BASE}+{'.'.join([os.environ['BITDECODING_CUDA'], *archs])}"}
