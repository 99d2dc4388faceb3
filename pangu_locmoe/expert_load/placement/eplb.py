"""Balance by load alone: groups to nodes, spare slots to the hottest experts, copies to ranks.

The algorithm that DeepSeek published with its EPLB (hierarchical and global), in our own code and
for all layers at once. It looks neither at where the tokens come from nor at the placement there
is, so it prices no bytes and no moves.

Letters: L layers (or each layer's nodes, one after the other), N nodes, E experts (or those of a
node), J expert groups, P slots, I items, X packs.
"""

from __future__ import annotations

from typing import Any, Tuple

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.errors import DataError

Ints = NDArray[np.int64]


def rebalance(
    weight_LE: NDArray[Any], num_slots: int, num_expert_groups: int, num_nodes: int, num_ranks: int
) -> Tuple[Ints, Ints, Ints]:
    """Place every expert of every layer, the hottest ones several times.

    Hierarchical if num_expert_groups is a multiple of num_nodes: the groups are packed into nodes,
    each node's slots are filled with its experts, the copies are packed into its ranks. Otherwise
    global: the same with one node and one group. Computed in float32, as the original is, so that
    ties fall the same way.

    Args:
        weight_LE: load of each expert, any unit.
        num_slots: P of a layer, over all ranks.
        num_expert_groups: consecutive runs of experts that a node should hold together.
        num_nodes, num_ranks: ranks are numbered node by node.

    Returns:
        expert_of_slot int64 [L, P], rank r holds the r-th contiguous block of slots;
        slots_of_expert int64 [L, E, most copies of any expert], its slots in the order they were
        given out, padded with -1; copies int64 [L, E].

    Raises:
        DataError: the numbers do not divide each other.
    """
    weight_LE = np.asarray(weight_LE, dtype=np.float32)
    num_layers, num_experts = weight_LE.shape
    check_sizes(num_experts, num_slots, num_expert_groups, num_nodes, num_ranks)
    if num_expert_groups % num_nodes:
        num_expert_groups = 1
        num_nodes = 1
    group_size = num_experts // num_expert_groups
    weight_LJ = weight_LE.reshape(num_layers, num_expert_groups, group_size).sum(
        axis=2, dtype=np.float32
    )
    group_of_position_LJ = pack(weight_LJ, num_nodes)
    expert_of_position_LE = (
        group_of_position_LJ[:, :, None] * group_size + np.arange(group_size)
    ).reshape(num_layers, num_nodes, -1)
    layer_L1 = np.arange(num_layers)[:, None]
    expert_of_slot_LP, number_LP = fill_nodes(
        weight_LE[layer_L1[:, None], expert_of_position_LE],
        expert_of_position_LE,
        num_slots,
        num_ranks,
    )
    copies_LE = np.zeros(weight_LE.shape, dtype=np.int64)
    np.maximum.at(copies_LE, (layer_L1, expert_of_slot_LP), number_LP + 1)
    slots_of_expert = np.full((*copies_LE.shape, copies_LE.max()), -1, dtype=np.int64)
    slots_of_expert[layer_L1, expert_of_slot_LP, number_LP] = np.arange(num_slots)
    return expert_of_slot_LP, slots_of_expert, copies_LE


def fill_nodes(
    weight_LNE: NDArray[Any], expert_LNE: Ints, num_slots: int, num_ranks: int
) -> Tuple[Ints, Ints]:
    """Steps two and three: fill each node's slots with copies of its experts and pack these into
    its ranks.

    Args:
        weight_LNE: load of the node's experts.
        expert_LNE: which experts these are.
        num_slots, num_ranks: over all nodes.

    Returns:
        expert_of_slot int64 [L, P]; which of the node's copies of the expert that is, from 0, int64
        [L, P].
    """
    num_layers, num_nodes, per_node = expert_LNE.shape
    weight_LE = weight_LNE.reshape(-1, per_node).astype(np.float32)  # L: a node of a layer
    item_LP, number_LP, copies_LE = copy_hottest(weight_LE, num_slots // num_nodes)
    row_L1 = np.arange(len(weight_LE))[:, None]
    slot_LP = pack(
        weight_LE[row_L1, item_LP] / copies_LE[row_L1, item_LP].astype(np.float32),
        num_ranks // num_nodes,
    )
    expert_of_slot_LP = expert_LNE.reshape(-1, per_node)[row_L1, item_LP[row_L1, slot_LP]]
    return expert_of_slot_LP.reshape(num_layers, num_slots), number_LP[row_L1, slot_LP].reshape(
        num_layers, num_slots
    )


def copy_hottest(weight_LE: NDArray[Any], num_slots: int) -> Tuple[Ints, Ints, Ints]:
    """Every expert once, then each spare slot to the expert with the most load per copy.

    Returns:
        expert of each slot int64 [L, P], which copy of it that is int64 [L, P], copies int64 [L,
        E].
    """
    num_rows, num_experts = weight_LE.shape
    item_LP = np.tile(np.arange(num_slots), (num_rows, 1))
    number_LP = np.zeros_like(item_LP)
    copies_LE = np.ones((num_rows, num_experts), dtype=np.int64)
    rows_L = np.arange(num_rows)
    for slot in range(num_experts, num_slots):
        hottest_L = np.argmax(weight_LE / copies_LE.astype(weight_LE.dtype), axis=1)
        item_LP[:, slot], number_LP[:, slot] = hottest_L, copies_LE[rows_L, hottest_L]
        copies_LE[rows_L, hottest_L] += 1
    return item_LP, number_LP, copies_LE


def pack(weight_LI: NDArray[Any], num_packs: int) -> Ints:
    """Equally many items into each pack: the heaviest item first, into the lightest pack that has
    room.

    Returns:
        int64 [L, I]: pack by pack, the item at each position, in the order in which they went in.
    """
    num_rows, num_items = weight_LI.shape
    room = num_items // num_packs
    if room == 1:  # every packing is as good as any other: leave the items where they are
        return np.tile(np.arange(num_items), (num_rows, 1))
    weight_LX = np.zeros((num_rows, num_packs), dtype=weight_LI.dtype)
    items_LX = np.zeros((num_rows, num_packs), dtype=np.int64)
    item_of_position_LI = np.empty((num_rows, num_items), dtype=np.int64)
    rows_L = np.arange(num_rows)
    for item_L in np.argsort(-weight_LI, axis=1, kind="stable").T:
        lightest_L = np.argmin(np.where(items_LX < room, weight_LX, np.inf), axis=1)
        item_of_position_LI[rows_L, lightest_L * room + items_LX[rows_L, lightest_L]] = item_L
        weight_LX[rows_L, lightest_L] += weight_LI[rows_L, item_L]
        items_LX[rows_L, lightest_L] += 1
    return item_of_position_LI


def check_sizes(
    num_experts: int, num_slots: int, num_expert_groups: int, num_nodes: int, num_ranks: int
) -> None:
    """Raises DataError, naming both numbers, if experts, slots, groups, nodes and ranks do not
    fit each other.
    """
    sizes = {
        "experts": num_experts,
        "slots": num_slots,
        "groups": num_expert_groups,
        "nodes": num_nodes,
        "ranks": num_ranks,
    }
    for name, value in sizes.items():
        if value < 1:
            raise DataError(f"{name} ({value}) must be at least 1")
    if num_slots < num_experts:
        raise DataError(f"slots ({num_slots}) must be at least the experts ({num_experts})")
    for name, divisor in (("slots", "ranks"), ("ranks", "nodes"), ("experts", "groups")):
        if sizes[name] % sizes[divisor]:
            plus = " (experts plus copies)" if name == "slots" else ""
            raise DataError(
                f"{name}{plus} ({sizes[name]}) must be divisible by {divisor} ({sizes[divisor]})"
            )
