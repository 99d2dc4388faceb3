"""A cell that is compiled as one graph, and that can be let go of."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import nn


class CompiledCell:
    """Calls a cell as a graph.

    MindSpore keeps every graph that it has compiled until the process ends, whether or not anything
    can still call it: a run whose sizes change would grow with each of them.
    """

    def __init__(self, cell: nn.Cell) -> None:
        self.cell = cell
        self._call = ms.jit(cell)

    def __call__(self, *inputs: Any) -> Any:
        return self._call(*inputs)

    def release(self) -> None:
        """Free the graph; a later call would compile it anew."""
        # Imported here: where MindSpore keeps its graphs is no interface, and is elsewhere before
        # 2.10, which then keeps them.
        try:
            from mindspore._c_expression import JitExecutor_
            from mindspore.graph.api import ms_compile_cache
        except ImportError:
            return
        phases = set(self.cell.phase_cache.values())
        JitExecutor_.get_instance().del_net_res(None, phases)
        ms_compile_cache.difference_update(phases)
        self.cell.phase_cache.clear()
