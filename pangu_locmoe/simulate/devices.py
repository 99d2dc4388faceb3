"""Devices and links: the figures that the time model multiplies with, from a YAML that names
their sources.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional, Union

from pangu_locmoe.config.reading import read
from pangu_locmoe.errors import ConfigError

DEVICES = Path(__file__).resolve().parent / "devices.yaml"


@dataclass(frozen=True)
class Device:
    """One rank's processor and its links.

    Attributes:
        name: in the file.
        ranks_per_node: where nothing else is said.
        peak_flops: FLOP/s of one rank.
        efficiency: fraction of the peak that its products reach, at most 1.
        intra_bandwidth: bytes/s of one rank to the others of its node, each direction.
        node_bandwidth: bytes/s of one node to the others over all of its cards, each direction.
        link_efficiency: fraction of both bandwidths that large messages get, at most 1.
        all_to_all_efficiency: fraction of that which the exchange gets between nodes, at most 1:
            its messages are many, and all links carry them at once.
        intra_latency, inter_latency: seconds that one message costs the rank that sends it.
        exchange_overhead: seconds of one exchange, whatever it moves.
        copy_bandwidth: bytes/s that a rank's processor can send on any link, in exchange and
            reduction; None: links do it alone.
        memory_bytes: of one rank's device; None: `check` cannot compare with it.
        fused_operators: whether it has the operators of train.fused.
        chip: its name as CANN has it, for a dry run; empty: not known.
        shared_processor: all ranks share one processor, as on an emulated cluster: what one leaves
            idle the others use, so the mean of their work counts and not the slowest.

    Raises:
        ConfigError: a figure is out of its range.
    """

    name: str
    ranks_per_node: int
    peak_flops: float
    efficiency: float
    intra_bandwidth: float
    node_bandwidth: float
    link_efficiency: float = 1.0
    all_to_all_efficiency: float = 1.0
    intra_latency: float = 0.0
    inter_latency: float = 0.0
    exchange_overhead: float = 0.0
    copy_bandwidth: Optional[float] = None
    memory_bytes: Optional[float] = None
    fused_operators: bool = False
    chip: str = ""
    shared_processor: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            rule = _RULES.get(field.name)
            value = getattr(self, field.name)
            if (
                rule is not None
                and not (value is None and field.default is None)
                and not _is_in(value, rule)
            ):
                raise ConfigError(f"{self.name}.{field.name} = {value!r}: must be {rule}")
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise ConfigError(f"{self.name}.{field.name} = {value!r}: must be true or false")

    @classmethod
    def named(cls, name: str, path: Union[str, Path] = DEVICES) -> Device:
        """The device of that name in the file. Raises ConfigError with the nearest name."""
        devices = load_devices(path)
        if name not in devices:
            nearest = difflib.get_close_matches(name, devices, n=1)
            raise ConfigError(
                f"device {name!r}: must be one of {', '.join(devices)}"
                + (f"; did you mean {nearest[0]}?" if nearest else "")
            )
        return devices[name]

    @property
    def flops_per_second(self) -> float:
        """What one rank sustains."""
        return self.peak_flops * self.efficiency

    def to_dict(self) -> Dict[str, Any]:
        return dataclasses.asdict(self)


_WHOLE = "a whole number of at least 1"
_POSITIVE = "a number above 0"
_NOT_NEGATIVE = "a number of at least 0"
_SHARE = "a number above 0 and at most 1"
_RULES = {
    "ranks_per_node": _WHOLE,
    **dict.fromkeys(
        ("peak_flops", "intra_bandwidth", "node_bandwidth", "copy_bandwidth", "memory_bytes"),
        _POSITIVE,
    ),
    **dict.fromkeys(("efficiency", "link_efficiency", "all_to_all_efficiency"), _SHARE),
    **dict.fromkeys(("intra_latency", "inter_latency", "exchange_overhead"), _NOT_NEGATIVE),
}


def _is_in(value: Any, rule: str) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return False
    if rule == _WHOLE:
        return isinstance(value, int) and value >= 1
    return value >= 0 if rule == _NOT_NEGATIVE else value > 0 and (rule != _SHARE or value <= 1)


def load_devices(path: Union[str, Path] = DEVICES) -> Dict[str, Device]:
    """Every device of a YAML file, by name.

    Raises:
        ConfigError: the file cannot be read, a key is unknown or missing, or a figure is out of its
            range; one line.
    """
    devices = {}
    for name, values in read(Path(path), ()).items():
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path}: {name}: must hold figures such as peak_flops, holds a "
                f"{type(values).__name__}"
            )
        try:
            devices[str(name)] = _device(str(name), values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    if not devices:
        raise ConfigError(f"{path}: has no device")
    return devices


def _device(name: str, values: Dict[Any, Any]) -> Device:
    known = [field.name for field in dataclasses.fields(Device) if field.name != "name"]
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(
                f"{name}.{key}: unknown key"
                + (
                    f"; did you mean {nearest[0]}?"
                    if nearest
                    else f"; must be one of {', '.join(known)}"
                )
            )
    missing = [
        field.name
        for field in dataclasses.fields(Device)
        if field.default is dataclasses.MISSING and field.name not in ("name", *values)
    ]
    if missing:
        raise ConfigError(f"{name}.{missing[0]}: missing; every device needs it")
    return Device(name, **values)
