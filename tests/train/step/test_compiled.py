"""A compiled cell is its graph, and lets MindSpore forget it."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from pangu_locmoe.train.step.compiled import CompiledCell

api = pytest.importorskip("mindspore.graph.api", reason="MindSpore before 2.10 keeps its graphs")


class Square(nn.Cell):
    def construct(self, x: Tensor) -> Tensor:
        return ops.square(x)


def test_a_released_graph_is_forgotten_and_compiled_anew():
    x = Tensor(np.array([2.0, 3.0], np.float32))
    before = set(api.ms_compile_cache)
    first, second = CompiledCell(Square()), CompiledCell(Square())
    for compiled in (first, second):
        assert compiled(x).asnumpy().tolist() == [4.0, 9.0]
    assert len(set(api.ms_compile_cache) - before) == 2
    first.release()
    assert len(set(api.ms_compile_cache) - before) == 1
    assert second(x).asnumpy().tolist() == first(x).asnumpy().tolist() == [4.0, 9.0]
    for compiled in (first, second):
        compiled.release()
    assert set(api.ms_compile_cache) == before
