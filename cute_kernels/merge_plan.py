"""The constants of the kernel that merges parts."""

from .config import HOPPER_ARCHS

THREADS = 128
VECTOR = 8  # values of a thread, 16 bit each


class MergePartsPlan:
    """The constants of a launch; read-only."""

    threads = THREADS
    smem_bytes = 0

    def __init__(self, config):
        self.head_dim = config.head_dim
        self.vectors = config.head_dim // VECTOR  # of a row
        self.programmatic = config.arch in HOPPER_ARCHS
