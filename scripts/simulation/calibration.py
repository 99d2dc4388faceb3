"""A device from measurements: the emulated cluster's processor and links, fitted to a few measured
steps.

A measured step has three parts, and each is a line in the same four unknowns (f, c, o, k):

    rest      = f * FLOPs of a rank
    exchange  = o * exchanges + c * bytes a rank sends + k * bytes through a node's link / rate
    reduction =                 c * bytes a rank sends + k * bytes through a node's link / rate

f: seconds of a FLOP, c: of a byte that the processor handles, o: of an exchange, waiting for the
slower ranks included,
k: bytes on the wire for one byte of payload. Least squares with no unknown below 0; a row's
equations are divided by its step.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
from scipy.optimize import nnls

from pangu_locmoe.config import Config
from pangu_locmoe.errors import DataError
from pangu_locmoe.simulate.cost import Step
from pangu_locmoe.simulate.devices import Device
from pangu_locmoe.simulate.model import Assumptions, simulate
from pangu_locmoe.simulate.routing import Routing

UNLIMITED = 1e15  # bytes/s
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "bit": 1.0}
Row = Dict[str, Any]


@dataclass(frozen=True)
class Prediction:
    """One measured configuration and what the model says of it, seconds."""

    router: str
    levels: int
    link_rate: str
    measured: float
    predicted: float
    measured_exchange: float
    predicted_exchange: float

    @property
    def error(self) -> float:
        """Predicted over measured step, less 1."""
        return self.predicted / self.measured - 1


def link_bytes_per_second(rate: str) -> float:
    """`50mbit`, as tc writes it, or `unlimited`. Raises DataError for anything else."""
    if rate == "unlimited":
        return UNLIMITED
    for unit, bits in _UNITS.items():
        if rate.endswith(unit):
            try:
                value = float(rate[: -len(unit)]) * bits / 8
            except ValueError:
                break
            if math.isfinite(value) and value > 0:
                return value
            break
    raise DataError(f"link rate {rate!r}: must be a rate such as 50mbit, or unlimited")


def calibrate(
    rows: Sequence[Row], config: Config, nodes: int = 2, name: str = "emulated_cpu"
) -> Device:
    """The device on which the model takes as long as was measured.

    Args:
        rows: as scripts/compare_routers.py writes them: link_rate, step_seconds, exchange_seconds,
            reduce_seconds, local_fraction, max_over_mean_load. At least one link must be limited,
            or the wire stays unknown.
        config: what was run; all ranks of the cluster share the experts, expert_parallel times
            tensor_parallel of them.
        nodes: of the cluster.
        name: of the device.

    Raises:
        DataError: no rows, a key is missing or not a positive number, or no row has a limited link.
    """
    if not rows:
        raise DataError("no measured rows to calibrate with")
    equations: List[List[float]] = []
    measured: List[float] = []
    for row in rows:
        step, exchange, reduction = (
            _number(row, key) for key in ("step_seconds", "exchange_seconds", "reduce_seconds")
        )
        unit = [_parts(row, config, nodes, device) for device in _units(config, nodes)]
        flops, copy_exchange, copy_reduction, overhead, wire_exchange, wire_reduction = (
            _coefficients(unit)
        )
        slowness = 1 / link_bytes_per_second(row["link_rate"])
        equations += [
            [flops / step, 0, 0, 0],
            [0, copy_exchange / step, overhead / step, wire_exchange * slowness / step],
            [0, copy_reduction / step, 0, wire_reduction * slowness / step],
        ]
        measured += [(step - exchange - reduction) / step, exchange / step, reduction / step]
    if all(row["link_rate"] == "unlimited" for row in rows):
        raise DataError(
            "every measured row has unlimited links: what a byte on the wire costs cannot be told"
        )
    matrix = np.array(equations)
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    flop, byte, overhead, wire = nnls(matrix / scale, np.array(measured))[0] / scale
    if flop <= 0:
        raise DataError("the measured rows leave no time for computing")
    return Device(
        name,
        _ranks_per_node(config, nodes),
        peak_flops=float(1 / flop),
        efficiency=1.0,
        intra_bandwidth=UNLIMITED,
        node_bandwidth=UNLIMITED,
        link_efficiency=float(min(1.0, 1 / wire)) if wire > 0 else 1.0,
        exchange_overhead=float(overhead),
        copy_bandwidth=float(1 / byte) if byte > 0 else None,
        shared_processor=True,
    )


def predictions(
    rows: Sequence[Row], config: Config, device: Device, nodes: int = 2
) -> List[Prediction]:
    """Measured and predicted step of each row; local fraction and max/mean load are the row's,
    seconds are not looked at.
    """
    result = []
    for row in rows:
        step = _parts(
            row,
            config,
            nodes,
            dataclasses.replace(device, node_bandwidth=link_bytes_per_second(row["link_rate"])),
        )
        measured = _number(row, "step_seconds"), _number(row, "exchange_seconds")
        result.append(
            Prediction(
                row["router"],
                row.get("levels", 1),
                row["link_rate"],
                measured[0],
                step.seconds,
                measured[1],
                step.exchange,
            )
        )
    return result


def _parts(row: Row, config: Config, nodes: int, device: Device) -> Step:
    routing = Routing(
        min(1.0, _number(row, "local_fraction")), max(1.0, _number(row, "max_over_mean_load"))
    )
    assumed = Assumptions(
        routing={row["router"]: routing},
        reduction=row.get("reduction", "flat"),  # the only one when older rows were measured
    )
    return simulate(config, [nodes], [row["router"]], device, assumptions=assumed).rows[0].step


def _ranks_per_node(config: Config, nodes: int) -> int:
    return max(1, config.parallel.expert_parallel * config.parallel.tensor_parallel // nodes)


def _units(config: Config, nodes: int) -> Tuple[Device, Device, Device, Device]:
    """Devices on which one thing costs one second and the others nothing: a FLOP, a copied byte,
    an exchange, a byte on a link.
    """
    free = Device(
        "unit", _ranks_per_node(config, nodes), 1e300, 1.0, 1e300, 1e300, shared_processor=True
    )
    changes: Tuple[Dict[str, Any], ...] = (
        {"peak_flops": 1.0},
        {"copy_bandwidth": 1.0},
        {"exchange_overhead": 1.0},
        {"node_bandwidth": 1.0},
    )
    first, second, third, fourth = (dataclasses.replace(free, **change) for change in changes)
    return first, second, third, fourth


def _coefficients(unit: Sequence[Step]) -> Tuple[float, float, float, float, float, float]:
    flop, copy, exchange, wire = unit
    computing = flop.dense + flop.experts + flop.straggler
    return (
        computing,
        copy.exchange,
        copy.reduction,
        exchange.exchange,
        wire.exchange,
        wire.reduction,
    )


def _number(row: Row, key: str) -> float:
    value = row.get(key)
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (math.isfinite(value) and value >= 0)
    ):
        raise DataError(
            f"measured row of {row.get('router', 'no router')}: {key} = {value!r}: must be "
            "a number of at least 0"
        )
    return float(value)
