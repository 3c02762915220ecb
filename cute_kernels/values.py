"""What kernels do with values in registers: types, and the soft cap of scores."""

from cutlass import Float32, cute

from . import ptx
from .work import Params

LOG2E = 1.4426950408889634
FIRST_MAX = -1.0e30  # running maximum before the first key: finite, so that masked scores give exp2(-inf) = 0
HALF_MAX = 65504.0
HALF2_ONES = 0x3C003C00


@cute.jit
def floats(p: Params, registers: list):
    """Registers of two 16-bit values of the model's dtype as fp32, in order."""
    values = [x for register in registers for x in ptx.half2_floats(register)]
    if p.bfloat16 == 1:
        values = [x for register in registers for x in ptx.bfloat2_floats(register)]
    return values


@cute.jit
def halves(p: Params, registers: list):
    """Registers of two 16-bit values of the model's dtype as fp16; bf16 beyond its range saturates."""
    if p.bfloat16 == 1:
        registers = [ptx.to_half2(*[saturated(x) for x in ptx.bfloat2_floats(register)]) for register in registers]
    return registers


def saturated(x: Float32) -> Float32:
    return ptx.fmin(ptx.fmax(x, Float32(-HALF_MAX)), Float32(HALF_MAX))


def soft_capped(scores: list, cap: Float32, factor: Float32 | None = None) -> list:
    """cap * tanh(s / cap) of log2 scores s, or of what times ``factor`` are log2 scores, as such; lists may be nested.

    tanh through exp2, since tanh.approx has 11 bits only.
    """
    inverse = ptx.reciprocal(cap) * 2.0  # exp2(log2 score * 2 / cap) = e^(2 s / cap)
    if factor is None:
        limit = cap * LOG2E
    else:
        inverse = inverse * factor
        limit = ptx.reciprocal(inverse) * (2.0 * LOG2E)

    def capped(x: list | Float32) -> list | Float32:
        if isinstance(x, list):
            return [capped(y) for y in x]
        share = ptx.reciprocal(ptx.exp2(x * inverse) + 1.0)
        return limit - 2.0 * limit * share

    return capped(scores)
