"""Placements in the files of serving engines: written from a plan, and read back.

vllm-ascend, expert_map.json (`expert_map_path`): layer by layer and device by device
    {"moe_layer_count": 1, "layer_list": [{"layer_id": 0, "device_count": 2, "device_list":
     [{"device_id": 0, "device_expert": [0, 2]}, {"device_id": 1, "device_expert": [1, 3]}]}]}
It goes by the order of the lists; a device cannot hold an expert twice (spread.py).

SGLang, --init-expert-location, .json or .pt, with no other key:
    {"physical_to_logical_map": [[0, 2, 1, 3]]}
Its layers are all hidden layers of the model, as in a trace from its recorder.

EPLB, the three arrays of rebalance_experts, in an .npz or as lists in JSON:
    phy2log [layers, slots], log2phy [layers, experts, most copies] padded with -1, and
    logcnt [layers, experts]

Letters: L layers, R ranks, E experts, P expert slots.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.errors import DataError, one_line
from pangu_locmoe.expert_load.placement.costs import Ints
from pangu_locmoe.expert_load.placement.plan import PlacementPlan, save_plan
from pangu_locmoe.expert_load.placement.reading import read_plan
from pangu_locmoe.expert_load.torch_file import read_torch
from pangu_locmoe.files import json_text, write_atomic

PLAN = "pangu-locmoe"
FORMATS = (PLAN, "vllm-ascend", "sglang", "eplb")

SGLANG_KEY = "physical_to_logical_map"
EPLB_KEYS = ("phy2log", "log2phy", "logcnt")


@dataclass(frozen=True)
class Placement:
    """Where experts are.

    Attributes:
        expert_of_slot_LP: int64; rank r holds the r-th contiguous block of slots.
        num_ranks: R; None: the file does not say.
    """

    expert_of_slot_LP: Ints
    num_ranks: Optional[int]


def save_placement(plan: PlacementPlan, path: Path, format: str = PLAN) -> None:
    """Write a plan in one of FORMATS, whole or not at all; `eplb` as .npz if the path ends so.

    Raises DataError: the engine could not load it; it cannot be written.
    """
    ranks = plan.nodes * plan.ranks_per_node
    if format == PLAN:
        save_plan(plan, path)
        return
    if format == "vllm-ascend":
        content = _text(vllm_ascend_map(plan.expert_of_slot_LP, ranks))
    elif format == "sglang":
        content = _text({SGLANG_KEY: plan.expert_of_slot})
    elif format == "eplb":
        arrays = eplb_arrays(plan.expert_of_slot_LP, plan.experts)
        content = _npz(arrays) if path.suffix.lower() == ".npz" else _lists(arrays)
    else:
        raise DataError(f"unknown format {format!r}: {', '.join(FORMATS)}")
    try:
        write_atomic(path, content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None


def vllm_ascend_map(expert_of_slot_LP: Ints, num_ranks: int) -> Dict[str, Any]:
    """The content of expert_map.json. Raises DataError if a rank would hold an expert twice."""
    layers = []
    for layer, expert_of_slot_P in enumerate(expert_of_slot_LP):
        devices = []
        for rank, experts in enumerate(expert_of_slot_P.reshape(num_ranks, -1).tolist()):
            twice = [expert for expert in experts if experts.count(expert) > 1]
            if twice:
                raise DataError(
                    f"layer {layer}, rank {rank}: two copies of expert {twice[0]} on one rank, "
                    "which vllm-ascend cannot load; give fewer copies"
                )
            devices.append({"device_id": rank, "device_expert": experts})
        layers.append({"layer_id": layer, "device_count": num_ranks, "device_list": devices})
    return {"moe_layer_count": len(layers), "layer_list": layers}


def eplb_arrays(expert_of_slot_LP: Ints, num_experts: int) -> Dict[str, Ints]:
    """phy2log [L, P], log2phy [L, E, most copies] in the order of the slots, logcnt [L, E]."""
    num_layers, num_slots = expert_of_slot_LP.shape
    layer_L1 = np.arange(num_layers)[:, None]
    number_LP = np.zeros_like(expert_of_slot_LP)
    count_LE = np.zeros((num_layers, num_experts), np.int64)
    for slot, expert_L in enumerate(expert_of_slot_LP.T):
        number_LP[:, slot] = count_LE[layer_L1[:, 0], expert_L]
        count_LE[layer_L1[:, 0], expert_L] += 1
    log2phy = np.full((num_layers, num_experts, int(count_LE.max())), -1, np.int64)
    log2phy[layer_L1, expert_of_slot_LP, number_LP] = np.arange(num_slots)
    return dict(zip(EPLB_KEYS, (expert_of_slot_LP, log2phy, count_LE)))


def load_placement(path: Path) -> Placement:
    """A placement from a plan of `load place` or from a file of any of FORMATS.

    Raises DataError in one line if it is none of them.
    """
    try:
        return _placement(_content(path))
    except DataError as error:
        raise DataError(f"{path}: not a plan: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: not a plan: {error.strerror or error}") from None


def _content(path: Path) -> Any:
    head = path.read_bytes()
    if path.suffix.lower() in (".pt", ".pth"):
        return read_torch(path)
    try:
        if head.startswith(b"PK"):
            with np.load(io.BytesIO(head), allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        return json.loads(head)
    except Exception as error:  # a damaged archive can raise almost anything
        raise DataError(one_line(error)) from None


def _placement(content: Any) -> Placement:
    keys = set(content) if isinstance(content, dict) else set()
    if "layer_list" in keys:
        return _vllm_ascend(content)
    if SGLANG_KEY in keys:
        return Placement(_checked(SGLANG_KEY, content[SGLANG_KEY]), None)
    if EPLB_KEYS[0] in keys:
        return _eplb(content)
    plan = read_plan(content)
    return Placement(plan.expert_of_slot_LP, plan.nodes * plan.ranks_per_node)


def _vllm_ascend(content: Dict[str, Any]) -> Placement:
    layers = _list("layer_list", content, "moe_layer_count", "layer_id")
    tables = []
    for place, layer in enumerate(layers):
        where = f"layer_list[{place}]."
        devices = _list("device_list", layer, "device_count", "device_id", where)
        tables.append([device.get("device_expert") for device in devices])
    expert_LRP = _array(tables)
    if expert_LRP.ndim != 3:
        raise DataError("device_expert must be lists of experts, equally many for each device")
    layer_count, ranks = expert_LRP.shape[:2]
    return Placement(_checked("device_expert", expert_LRP.reshape(layer_count, -1)), ranks)


def _list(key: str, content: Any, count_key: str, id_key: str, where: str = "") -> Any:
    """Objects in the order of their ids, as vllm-ascend, which does not look at the ids, reads
    them.
    """
    values = content.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(v, dict) for v in values):
        raise DataError(f"{where}{key} must be a list of objects")
    if content.get(count_key, len(values)) != len(values):
        raise DataError(f"{where}{count_key} is {content[count_key]}, {key} has {len(values)}")
    ids = [value[id_key] for value in values if id_key in value]
    if any(type(number) is not int for number in ids) or ids != sorted(set(ids)):
        raise DataError(f"{where}{key}: {id_key} must rise; vllm-ascend goes by the order")
    return values


def _eplb(content: Dict[str, Any]) -> Placement:
    missing = [key for key in EPLB_KEYS if key not in content]
    if missing:
        raise DataError(f"lacks {missing[0]}")
    expert_of_slot_LP = _checked(EPLB_KEYS[0], content[EPLB_KEYS[0]])
    expected = eplb_arrays(expert_of_slot_LP, int(expert_of_slot_LP.max()) + 1)
    for key in EPLB_KEYS[1:]:
        given = _array(content[key])
        if given.ndim == 3:
            given = np.sort(given, axis=2)  # the order of an expert's copies is free
            given = given[:, :, (given >= 0).any(axis=(0, 1))]
        own = np.sort(expected[key], axis=2) if expected[key].ndim == 3 else expected[key]
        if given.shape != own.shape or (given != own).any():
            raise DataError(f"{key} does not belong to {EPLB_KEYS[0]}")
    return Placement(expert_of_slot_LP, None)


def _checked(name: str, value: Any) -> Ints:
    """An expert for each slot, every expert in each layer. Raises DataError."""
    array_LP = _array(value)
    if array_LP.ndim != 2 or array_LP.size == 0 or array_LP.dtype.kind not in "iu":
        raise DataError(f"{name} must be experts, a list of equally many slots for each layer")
    experts = int(array_LP.max()) + 1
    if array_LP.min() < 0 or experts > array_LP.shape[1]:
        raise DataError(
            f"{name} must be experts from 0 to less than {array_LP.shape[1]}, the slots of a layer"
        )
    for layer, expert_P in enumerate(array_LP):
        missing = np.setdiff1d(np.arange(experts), expert_P)
        if len(missing):
            raise DataError(f"{name}[{layer}] lacks expert {missing[0]}")
    return array_LP.astype(np.int64)


def _array(value: Any) -> NDArray[Any]:
    """Of no axis that fits where it is lists of unequal lengths."""
    try:
        return np.asarray(value)
    except (ValueError, OverflowError):
        return np.empty(0)


def _text(value: Dict[str, Any]) -> bytes:
    return (json_text(value) + "\n").encode()


def _lists(arrays: Dict[str, Ints]) -> bytes:
    return _text({key: array.tolist() for key, array in arrays.items()})


def _npz(arrays: Dict[str, Ints]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()
