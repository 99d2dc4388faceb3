"""Token similarity of a real model, for every router."""

from __future__ import annotations

import numpy as np
import pytest
from study.tokens import similarities
from support import tiny

from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.model.sigma import PanguSigma


@pytest.mark.parametrize("router", ["hash", "locmoe_plus"])
def test_every_sparse_layer_is_looked_at(router):
    config = tiny.tiny_config(model={"num_layers": 4, "num_moe_layers": 2}, moe={"router": router})
    found = np.array(similarities(PanguSigma(config), config, prepare(config, False), 2))
    assert found.shape == (2, 2)
    assert (np.abs(found) <= 1).all() and np.isfinite(found).all()
    if (
        router == "locmoe_plus"
    ):  # its experts are where a token's features are large: those of one expert are alike
        assert (found[:, 0] > found[:, 1]).all()
