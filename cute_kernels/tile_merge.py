"""Merging in a wgmma kernel with dequantised tiles: the results of a piece lie where its last tiles lay."""

from cutlass import Int32

from . import ptx
from .merge import combine
from .plan import QUAD
from .tile_attention import CORE, result_at
from .tile_plan import STATE_BYTES
from .wide_merge import WideMerge


class TileMerge(WideMerge):
    """Merging in one kernel."""

    def combine_warps(self, smem: Int32, column: Int32, item: Int32) -> tuple:
        """As in merge.py: the results of the warpgroups that took turns."""
        plan = self.plan
        vectors = CORE // QUAD
        first = item * (plan.width // QUAD)
        states, values = [], []
        for s in range(plan.states):
            sums = smem + plan.sums_at + column * STATE_BYTES
            states.append(ptx.load_shared_floats(sums, s * plan.q_tile * STATE_BYTES, 2))
            results = ptx.load_shared(smem, plan.places_at + 4 * s, 1)[0]
            value = []
            for i in range(plan.width // QUAD):
                at = result_at(plan, column, (first + i) // vectors) + (first + i) % vectors * (4 * QUAD)
                value += ptx.load_shared_floats(results + at, 0, QUAD)
            values.append(value)
        return combine(states, values)
