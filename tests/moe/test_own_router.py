"""The documentation's example of a router of one's own works as it stands."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor
from support.numeric import close, no_noise
from support.small import small_config

from pangu_locmoe.config.routers import ROUTER_TRAITS
from pangu_locmoe.data.loader import Batch
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.capacity import DROPLESS
from pangu_locmoe.moe.routers import ROUTERS, router_class
from pangu_locmoe.train.step.local import LocalStepper

DOCUMENT = Path(__file__).parents[2] / "docs" / "routing.md"


@pytest.fixture
def documented_router(tmp_path):
    (code,) = re.findall(
        r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    file = tmp_path / "first_features.py"
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("first_features", file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield "first_features"
    del ROUTERS["first_features"], ROUTER_TRAITS["first_features"]


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Where modules of a user's own are found; what they register is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    names = set(ROUTERS)
    yield tmp_path
    for name in set(ROUTERS) - names:
        del ROUTERS[name], ROUTER_TRAITS[name]


def own_config(router: str, **moe: object):
    return small_config(moe={"router": router, **moe})


def refusal(router: str, **moe: object) -> str:
    with pytest.raises(ConfigError) as raised:
        router_class(own_config(router, **moe))
    (line,) = str(raised.value).splitlines()
    return line


def test_a_module_or_class_that_is_not_there_is_refused_where_the_router_is_needed(own_module):
    (own_module / "empty_module.py").write_text("")
    (own_module / "broken_module.py").write_text("1 / 0\n")
    line = refusal("no_such_module:Mine")
    assert line.startswith("moe.router = 'no_such_module:Mine': no_such_module cannot be imported")
    assert "ZeroDivisionError" in refusal("broken_module:Mine")
    assert "no subclass of Router named 'Mine'" in refusal("empty_module:Mine")
    line = refusal("json:JSONDecoder")
    assert "json/__init__.py) has no subclass of Router named 'JSONDecoder'" in line


def test_a_router_of_ones_own_says_what_it_cannot_work_with(own_module):
    (own_module / "gateless.py").write_text(
        "from pangu_locmoe.moe.routers import Router\nclass Mine(Router):\n    has_gate = False\n"
    )
    assert router_class(own_config("gateless:Mine")).traits.has_gate is False
    line = refusal("gateless:Mine", capacity={"policy": "bound"})
    assert line.startswith(
        "moe.capacity.policy = 'bound': needs a router with a gate: gateless:Mine"
    )


def test_a_class_says_what_is_otherwise_with_it_than_with_the_one_it_is_made_from():
    class Quiet(ROUTERS["locmoe"]):
        has_balance_loss = False

    class Quieter(Quiet):
        has_locality_loss = False

    assert Quieter.traits == replace(
        ROUTER_TRAITS["locmoe"], has_balance_loss=False, has_locality_loss=False
    )


def test_the_table_of_traits_is_that_of_the_classes():
    names = ["hash", "local_hash", "locmoe", "locmoe_plus", "switch"]
    assert sorted(name for name in ROUTERS if ":" not in name) == names
    assert all(ROUTERS[name].traits == ROUTER_TRAITS[name] for name in names)


def test_the_documented_router_routes(documented_router):
    config = small_config(moe={"router": documented_router})
    model, (batch, length) = PanguSigma(config), (2, config.model.seq_length)
    tokens_BS = (
        np.random.default_rng(0)
        .integers(0, config.model.vocab_size, (batch, length))
        .astype(np.int32)
    )
    places_BS = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    inputs = (tokens_BS, places_BS, np.zeros_like(tokens_BS), np.zeros(batch, np.int32))
    noise = no_noise(batch * length, config.model.hidden_size)
    _, stats = model(*map(Tensor, inputs), noise, (0,) * config.model.num_moe_layers, False)
    assert stats["load_LNE"].asnumpy().sum() == config.model.num_moe_layers * batch * length


@pytest.mark.parametrize("name", ["OwnLosses", "Spread"])
def test_a_compiled_step_trains_on_what_a_router_of_ones_own_says(name):
    """The whole step: gradients of a plan that is made of another one, and of a loss of
    everybody's means.
    """
    router = f"support.own_routers:{name}"
    rows = []
    try:
        for mode in ("graph", "pynative"):
            config = small_config(
                model={"num_layers": 2, "num_moe_layers": 1},
                moe={"router": router, "balance_loss": 0.5, "locality_loss": 0.3, "z_loss": 0.1},
                train={"mode": mode, "batch_size": 4},
            )
            stepper = LocalStepper(PanguSigma(config), config, None, (DROPLESS,))
            length = config.model.seq_length
            tokens_BS = np.random.default_rng(5).integers(0, 300, (4, length + 1)).astype(np.int32)
            positions_BS = np.tile(np.arange(length, dtype=np.int32), (4, 1))
            batch = Batch(
                tokens_BS[:, :-1].copy(),
                tokens_BS[:, 1:].copy(),
                positions_BS,
                np.zeros_like(positions_BS),
                np.zeros(4, np.int32),
                np.ones(4, bool),
            )
            rows.append(
                [
                    [*result.losses.values(), result.grad_norm]
                    for result in (stepper(batch, step, 1e-2) for step in (1, 2))
                ]
            )
    finally:
        ROUTERS.pop(router, None)
        ROUTER_TRAITS.pop(router, None)
    close(np.array(rows[0]), np.array(rows[1]), 1e-5)
    assert all(loss > 0 for loss in rows[0][0])
