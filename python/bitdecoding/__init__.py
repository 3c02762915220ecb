"""Decode attention over a low-bit paged KV cache.

Every function runs on CPU tensors (the reference backend) and on CUDA tensors (the kernels).
"""

from .cache import KVCache
from .cute_kernels.config import KernelConfig, QuantSpec
from .cute_kernels.errors import (
    BitDecodingError,
    CacheFormatError,
    CudaError,
    InvalidArgument,
    KernelNotFound,
    OutOfPages,
    UnsupportedConfig,
)
from .ops import append, block_bytes, decode, dequantize, merge, quantize, rotate, step
from .policy import QuantPolicy
from .quantization import PRESETS, CachePolicy, hadamard, preset

__all__ = [
    "PRESETS",
    "BitDecodingError",
    "CacheFormatError",
    "CachePolicy",
    "CudaError",
    "InvalidArgument",
    "KVCache",
    "KernelConfig",
    "KernelNotFound",
    "OutOfPages",
    "QuantPolicy",
    "QuantSpec",
    "UnsupportedConfig",
    "append",
    "block_bytes",
    "decode",
    "dequantize",
    "hadamard",
    "merge",
    "preset",
    "quantize",
    "rotate",
    "step",
]
