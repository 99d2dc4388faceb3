"""Fitting the emulated cluster: exact where the model is, refused where rows cannot say; and the
model on the paper's clusters.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from simulation.calibration import UNLIMITED, calibrate, link_bytes_per_second, predictions
from simulation.paper import (
    CONFIG,
    PAPER,
    PAPER_SHARES,
    changed,
    fit_exchange,
    reductions,
    result,
    table,
)
from simulation.plots import plot_scale, plot_sensitivity
from support.small import small_config

from pangu_locmoe.config import load_config
from pangu_locmoe.errors import ConfigError, DataError
from pangu_locmoe.simulate.devices import Device
from pangu_locmoe.simulate.model import Assumptions, simulate
from pangu_locmoe.simulate.routing import Routing

MEASURED = Path(__file__).resolve().parents[1] / "data" / "emulated_cluster.json"
TRUE = Device(
    "true",
    2,
    2e10,
    1.0,
    UNLIMITED,
    UNLIMITED,
    link_efficiency=0.45,
    exchange_overhead=0.01,
    copy_bandwidth=5e7,
    shared_processor=True,
)


@pytest.fixture
def config():
    return small_config(
        model={"hidden_size": 64, "ffn_size": 512, "seq_length": 64},
        moe={"num_experts": 8},
        parallel={"expert_parallel": 4, "nodes": 2},
        train={"batch_size": 16},
    )


def measured(config, device, router="hash", rate="100mbit", local=0.5, imbalance=1.1):
    at_rate = dataclasses.replace(device, node_bandwidth=link_bytes_per_second(rate))
    step = (
        simulate(
            config,
            [2],
            [router],
            at_rate,
            assumptions=Assumptions(routing={router: Routing(local, imbalance)}),
        )
        .rows[0]
        .step
    )
    seconds = {
        "step_seconds": step.seconds,
        "exchange_seconds": step.exchange,
        "reduce_seconds": step.reduction,
        "reduction": "hierarchical",
    }
    return {
        "router": router,
        "levels": 1,
        "link_rate": rate,
        "local_fraction": local,
        "max_over_mean_load": imbalance,
        **seconds,
    }


def test_what_the_model_made_is_found_again(config):
    rows = [measured(config, TRUE, rate=rate) for rate in ("unlimited", "100mbit", "1gbit")]
    found = calibrate(rows, config)
    for key in ("peak_flops", "link_efficiency", "exchange_overhead", "copy_bandwidth"):
        assert getattr(found, key) == pytest.approx(getattr(TRUE, key), rel=1e-4)
    others = [
        measured(config, TRUE, "locmoe", "50mbit", 0.9, 1.3),
        measured(config, TRUE, "switch", "100mbit", 0.5, 1.6),
    ]
    assert [row.error for row in predictions(others, config, found)] == pytest.approx(
        [0, 0], abs=1e-4
    )


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "no measured rows"),
        ([{"link_rate": "unlimited"}], "unlimited links"),
        ([{"step_seconds": None}], "step_seconds = None"),
        ([{"link_rate": "fast"}], "link rate 'fast'"),
        ([{"link_rate": "-1mbit"}], "link rate '-1mbit'"),
        ([{"exchange_seconds": float("nan")}], "exchange_seconds = nan"),
    ],
)
def test_rows_that_cannot_calibrate(config, rows, message):
    with pytest.raises(DataError, match=message):
        calibrate([{**measured(config, TRUE), **row} for row in rows], config)


def test_rates_as_tc_writes_them():
    assert [link_bytes_per_second(rate) for rate in ("8bit", "50mbit", "1.5gbit", "unlimited")] == [
        1,
        6.25e6,
        1.875e8,
        UNLIMITED,
    ]


def test_measured_steps_are_predicted_from_hash_alone():
    """13 runs of five configurations that were not calibrated with; the worst is 4.6% off."""
    kept = json.loads(MEASURED.read_text(encoding="utf-8"))
    config = load_config(CONFIG.parent / kept["config"], kept["overrides"])
    fitted_on = [row for row in kept["rows"] if row["use"] == "calibration"]
    assert {(row["router"], row["levels"]) for row in fitted_on} == {("hash", 1)}
    fitted = calibrate(fitted_on, config)
    found = predictions([row for row in kept["rows"] if row["use"] == "prediction"], config, fitted)
    assert len(found) == 13 and len({(row.router, row.levels, row.link_rate) for row in found}) == 5
    assert max(abs(row.error) for row in found) < 0.05
    named = Device.named("emulated_cpu")  # the file's figures are these, rounded
    for key in ("peak_flops", "link_efficiency", "exchange_overhead", "copy_bandwidth"):
        assert getattr(named, key) == pytest.approx(getattr(fitted, key), rel=0.01)


def test_another_day_and_another_sharding():
    """Three more configurations, calibrated with hash at two rates of their own day; the worst
    is 10.2% off.
    """
    kept = json.loads(
        MEASURED.with_name("emulated_cluster_sharding.json").read_text(encoding="utf-8")
    )
    config = load_config(CONFIG.parent / kept["config"], kept["overrides"])
    fitted = calibrate([row for row in kept["rows"] if row["use"] == "calibration"], config)
    found = predictions([row for row in kept["rows"] if row["use"] == "prediction"], config, fitted)
    assert [row.router for row in found] == ["hash", "switch", "locmoe"]
    assert max(abs(row.error) for row in found) < 0.15


# The paper's clusters


@pytest.fixture(scope="module")
def paper():
    return load_config(CONFIG), Device.named("ascend_910a")


def test_the_fitted_share_is_the_papers_and_the_other_is_near(paper):
    config, device = paper
    found = result("as assumed", config, device, PAPER)
    assert found.shares[16] == pytest.approx(PAPER_SHARES[16]) and found.shares[
        32
    ] == pytest.approx(PAPER_SHARES[32], abs=0.02)
    repeated = result("repeated", config, device, dataclasses.replace(PAPER, copies=True))
    assert repeated.shares[32] == pytest.approx(
        PAPER_SHARES[16], abs=0.005
    )  # what the paper saw comes from nodes without experts
    assert "| as assumed | 0.41 | 16.5% / 18.1% / 30.1% |" in table([found])


def test_a_share_that_no_link_has_is_refused(paper):
    config, device = paper
    with pytest.raises(
        ConfigError, match=r"exchange share 1.00% at 16 nodes: no all_to_all_efficiency"
    ):
        fit_exchange(config, device, PAPER, share=0.01)


def test_a_capacity_factor_only_touches_what_is_above_it(paper):
    config, device = paper
    by_factor = [
        reductions(
            simulate(
                changed(config, factor=factor),
                [8],
                ["hash", "switch", "locmoe"],
                device,
                assumptions=PAPER,
            ).rows
        )
        for factor in (1.0, 4.0)
    ]
    assert by_factor[0]["switch"][8] < by_factor[1]["switch"][8]


def test_pictures_are_drawn(tmp_path, paper):
    config, device = paper
    plot_sensitivity(config, device, PAPER, tmp_path / "a.svg")
    plot_scale(config, device, PAPER, tmp_path / "b.svg")
    assert all(
        path.read_text(encoding="utf-8").rstrip().endswith("</svg>")
        for path in (tmp_path / "a.svg", tmp_path / "b.svg")
    )
