"""Decode attention over a low-bit paged KV cache."""

from .cute_kernels.config import KernelConfig, QuantSpec

__all__ = ["KernelConfig", "QuantSpec"]
