"""The error types of the library. Every message names the argument, its value and what is allowed."""


class BitDecodingError(Exception):
    """Base of every error the library raises on purpose."""


class InvalidArgument(BitDecodingError, ValueError):
    """An argument has a wrong dtype, shape, stride, device or value."""


class UnsupportedConfig(BitDecodingError, NotImplementedError):
    """The arguments are sound, but no kernel can exist for this combination (on this architecture)."""


class KernelNotFound(BitDecodingError, LookupError):
    """No loaded kernel pack holds the kernel and nothing is installed that could compile it."""


class CudaError(BitDecodingError, RuntimeError):
    """The CUDA driver is missing or returned an error."""


class CacheFormatError(BitDecodingError, ValueError):
    """A saved cache is damaged, hostile, or of another format version."""


class OutOfPages(BitDecodingError, RuntimeError):
    """A cache has no free page for the tokens to be appended; nothing was changed."""
