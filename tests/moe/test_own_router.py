"""The documentation's example of a router of one's own works as it stands."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor
from numeric import no_noise
from small import small_config

from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.routers import ROUTERS

DOCUMENT = Path(__file__).parents[2] / "docs" / "routing.md"


@pytest.fixture
def documented_router(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    file = tmp_path / "first_features.py"
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("first_features", file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield "first_features"
    del ROUTERS["first_features"]


def test_the_documented_router_routes(documented_router):
    config = small_config(moe={"router": documented_router})
    model, (batch, length) = PanguSigma(config), (2, config.model.seq_length)
    tokens_BS = np.random.default_rng(0).integers(0, config.model.vocab_size, (batch, length)).astype(np.int32)
    places_BS = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    inputs = (tokens_BS, places_BS, np.zeros_like(tokens_BS), np.zeros(batch, np.int32))
    noise = no_noise(batch * length, config.model.hidden_size)
    _, stats = model(*map(Tensor, inputs), noise, (0,) * config.model.num_moe_layers, False)
    assert stats["load_LNE"].asnumpy().sum() == config.model.num_moe_layers * batch * length
