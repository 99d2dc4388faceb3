"""vllm-ascend's expert load: moe_load_N.npy, N the iteration at which rank 0 saved it.

An array [layers, ranks, slots of a rank] of counts since they were last cleared, gathered from all
ranks; the policy of several stages has [stages, layers, ranks, slots of a rank], which add up. The
file does not say which expert is in which slot: expert_map.json does (`expert_map`). Without it,
slot i holds expert i modulo the number of experts, as vllm-ascend places them at first. Nothing is
known of the nodes that tokens come from.

Letters: W rows (files), L layers, R ranks, E experts, P expert slots.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pangu_locmoe.errors import DataError, one_line
from pangu_locmoe.expert_load.importing.arrays import (
    Ints,
    by_expert,
    check_size,
    counts_of,
    map_of,
    number_of_experts,
    trace_of,
)
from pangu_locmoe.expert_load.importing.limits import Options, naming
from pangu_locmoe.expert_load.placement.formats import load_placement
from pangu_locmoe.expert_load.trace import LARGEST, Trace

NUMBER = re.compile(r"(\d+)\D*$", re.ASCII)
AXES = ("layers", "ranks", "slots of a rank")


def read(files: Sequence[Path], options: Options) -> Trace:
    """A row for each file. Raises DataError that names the file."""
    found: dict[int, Ints] = {}
    for place, path in enumerate(files):
        with naming(path):
            step = _step(path, place)
            if step in found:
                raise DataError(f"iteration {step} is there twice")
            found[step] = _counts(path)
            first = next(iter(found.values()))
            if found[step].shape != first.shape:
                raise DataError(
                    f"has layers, ranks and slots {list(found[step].shape)}, "
                    f"{files[0]} has {list(first.shape)}"
                )
    with naming(files[0]):
        count_WLP = np.stack(list(found.values()))
        count_WLP = count_WLP.reshape(*count_WLP.shape[:2], -1)
        map_LP = _map(count_WLP, options)
        num_experts = number_of_experts(options.num_experts, int(map_LP.max()) + 1, "the map")
        check_size(*count_WLP.shape[:2], num_experts)
        load_WLE = by_expert(count_WLP, map_LP, num_experts)
        return trace_of(list(found), load_WLE[:, :, None], sourced=False)


def _step(path: Path, place: int) -> int:
    """The last number in the name; without one, the place of the file among those given."""
    match = NUMBER.search(path.name.split(".")[0])
    return min(int(match[1]), LARGEST) if match else place


def _counts(path: Path) -> Ints:
    try:
        array = np.load(path, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a damaged header can raise almost anything
        raise DataError(f"not a whole .npy of numbers: {one_line(error)}") from None
    if not isinstance(array, np.ndarray):
        raise DataError("an .npz of several arrays; moe_load is one array, an .npy")
    if array.ndim == 4:
        return counts_of("moe_load", array, ("stages", *AXES)).sum(axis=0)
    if array.ndim == 2:  # of one rank, or all slots in a row
        return counts_of("moe_load", array, ("layers", "slots"))[:, None]
    return counts_of("moe_load", array, AXES)


def _map(count_WLP: Ints, options: Options) -> Ints:
    shape = count_WLP.shape[1:]
    if options.expert_map is None:
        slots = np.arange(shape[1])
        return np.tile(slots % (options.num_experts or shape[1]), (shape[0], 1))
    placement = load_placement(options.expert_map)
    with naming(options.expert_map):
        value = placement.expert_of_slot_LP
        return map_of("the map", value, shape, options.num_experts)
