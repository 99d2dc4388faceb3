"""A plan from a file, every value checked: training moves experts by it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Type, TypeVar

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.placement.costs import Costs
from pangu_locmoe.expert_load.placement.plan import FILE_KEY, POLICIES, Figures, PlacementPlan
from pangu_locmoe.expert_load.state import STABLE, TRANSIENT, UNKNOWN

Record = TypeVar("Record", PlacementPlan, Figures, Costs)


def load_plan(path: Path) -> PlacementPlan:
    """Raises DataError in one line if there is no such file or it is not a plan."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not a plan: {getattr(error, 'strerror', None) or error}"
        ) from None
    try:
        return read_plan(content)
    except DataError as error:
        raise DataError(f"{path}: not a plan: {error}") from None


def read_plan(content: Any) -> PlacementPlan:
    """The plan of `PlacementPlan.to_dict`'s content. Raises DataError, naming the key."""
    key = FILE_KEY
    if isinstance(content, dict) and "expert_of_slot" in content:
        key = "expert_of_slot"
    fields = _record(content, PlacementPlan, "the plan", {"expert_of_slot": key})
    for name in ("experts", "nodes", "ranks_per_node"):
        _require(_whole(fields[name], 1), name, "must be a positive integer")
    for name in ("groups", "horizon"):
        _require(
            fields[name] is None or _whole(fields[name], 1),
            name,
            "must be null or a positive integer",
        )
    _require(
        fields["origin"] is None or _whole(fields["origin"], 0), "origin", "must be null or a step"
    )
    _require(
        _whole(fields["experts_moved"], 0), "experts_moved", "must be an integer, not negative"
    )
    for name in ("bytes_moved", "move_seconds"):
        _require(_number(fields[name]), name, "must be a number, not negative")
    _require(fields["policy"] in POLICIES, "policy", f"must be {' or '.join(POLICIES)}")
    slots = fields.pop(key)
    ranks = fields["nodes"] * fields["ranks_per_node"]
    _require(isinstance(slots, list) and len(slots) > 0, key, "must be a list of layers")
    for layer, row in enumerate(slots):
        _check_layer(f"{key}[{layer}]", row, slots[0], fields["experts"], ranks)
    layers = len(slots)
    _list(
        fields,
        "state",
        layers,
        lambda value: value in (STABLE, TRANSIENT, UNKNOWN),
        f"{STABLE}, {TRANSIENT} or {UNKNOWN}",
    )
    _list(
        fields,
        "capacity_factor",
        layers,
        lambda value: value is None or _number(value),
        "null or a number, not negative",
    )
    for layer, (state, factor) in enumerate(zip(fields["state"], fields["capacity_factor"])):
        _require(
            (state == TRANSIENT) == (factor is not None),
            f"capacity_factor[{layer}]",
            f"must be a number in a {TRANSIENT} layer and only there",
        )
    _require(
        isinstance(fields["notes"], list)
        and all(isinstance(note, str) for note in fields["notes"]),
        "notes",
        "must be a list of texts",
    )
    for name in ("now", "after", "actual_now", "actual_after", "actual_oracle"):
        if fields[name] is not None or name in ("now", "after"):
            fields[name] = Figures(**_numbers(_record(fields[name], Figures, name), name))
    costs = _numbers(_record(fields["costs"], Costs, "costs"), "costs")
    _require(_whole(costs["horizon"], 1), "costs.horizon", "must be a positive integer")
    return PlacementPlan(**{**fields, "expert_of_slot": slots, "costs": Costs(**costs)})


def _check_layer(name: str, row: Any, first: Any, experts: int, ranks: int) -> None:
    _require(isinstance(row, list) and len(row) > 0, name, "must be a list of slots")
    _require(len(row) == len(first), name, f"has {len(row)} slots, the first layer {len(first)}")
    _require(len(row) % ranks == 0, name, f"has {len(row)} slots, not divisible by {ranks} ranks")
    _require(len(row) >= experts, name, f"has {len(row)} slots for {experts} experts")
    _require(
        all(_whole(value, 0) and value < experts for value in row),
        name,
        f"must be experts 0 to {experts - 1}",
    )
    missing = sorted(set(range(experts)) - set(row))
    _require(not missing, name, f"lacks expert {missing[0] if missing else ''}")


def _record(
    content: Any, kind: Type[Record], name: str, keys_of: Optional[Dict[str, str]] = None
) -> Dict[str, Any]:
    """Exactly the keys of the class; `keys_of` has those that differ from the field."""
    keys = {(keys_of or {}).get(field.name, field.name) for field in dataclasses.fields(kind)}
    _require(isinstance(content, dict), name, "must be an object")
    missing = sorted(keys - set(content))
    unknown = sorted(set(content) - keys)
    _require(not missing, name, f"lacks the key {missing[0] if missing else ''}")
    _require(not unknown, name, f"has an unknown key {unknown[0] if unknown else ''}")
    return dict(content)


def _numbers(record: Dict[str, Any], name: str) -> Dict[str, Any]:
    for key, value in record.items():
        _require(_number(value), f"{name}.{key}", "must be a number, not negative")
    return record


def _list(
    fields: Dict[str, Any], name: str, length: int, fits: Callable[[Any], bool], what: str
) -> None:
    values: List[Any] = fields[name]
    _require(
        isinstance(values, list) and len(values) == length and all(map(fits, values)),
        name,
        f"must be {length} values, each {what}",
    )


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and 0 <= value <= sys.float_info.max
    )


def _require(condition: bool, name: str, rule: str) -> None:
    if not condition:
        raise DataError(f"{name} {rule}")
