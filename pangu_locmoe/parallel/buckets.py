"""Gradients that travel together, and their sum over the ranks that hold the same.

`flat` adds up every gradient for itself, over all that hold it. `hierarchical` joins gradients in
buckets, and where several holders are in each of several nodes it goes by node: each rank of a node
gets its part of the node's sum, that part is added up with the ranks at the same place in the other
nodes, and the node puts the parts together. Between nodes a gradient travels once for each node
instead of once for each rank of a ring, and every number is added up by one rank or one ring: all
holders have the same, bit by bit.

With parallel.shard_optimizer the sums stay where they are, and the pieces that the ranks have
updated come back the same way: first between nodes, then inside.

Letters: R ranks that hold the same, N nodes, X ranks in each, M rows of a bucket that a rank gets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from pangu_locmoe.parallel.communicator import Communicator
from pangu_locmoe.parallel.gradients import holders_of, kind, with_axis_first
from pangu_locmoe.parallel.tensor import Piece
from pangu_locmoe.parallel.topology import Topology

BUCKET_BYTES = 32 * 2**20
"""Of fp32 numbers in a bucket; a larger gradient is one of its own and is not copied."""

Shape = Tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """A trainable parameter as one rank holds it; `kind` as in parallel/gradients.py: whole,
    slice or expert.
    """

    name: str
    shape: Shape
    kind: str

    @classmethod
    def of(cls, parameter: Parameter) -> Weight:
        return cls(parameter.name, tuple(parameter.shape), kind(parameter))


@dataclass(frozen=True)
class Bucket:
    """What is added up in one go.

    Attributes:
        members: which gradients, by their place among all.
        shapes: theirs; where the ranks divide them, with the axis first that is divided.
        axes: which axis that is; empty: all ranks get the whole sum.
        levels: the group of ranks, or two by node: this rank's inside its node, and those at its
            place in each node.
    """

    members: Tuple[int, ...]
    shapes: Tuple[Shape, ...]
    axes: Tuple[int, ...]
    levels: Tuple[Tuple[int, ...], ...]

    @property
    def num_ranks(self) -> int:
        return math.prod(map(len, self.levels))

    @property
    def is_alone(self) -> bool:
        """Whether it is one gradient that travels as it is."""
        return len(self.members) == len(self.levels) == 1

    @property
    def parts(self) -> int:
        """Into how many equal rows it is laid out."""
        return self.num_ranks if self.axes else len(self.levels[0])

    @property
    def columns(self) -> int:
        """M, numbers of a row; of a whole sum's last row some may be padding."""
        return -(-sum(map(math.prod, self.shapes)) // self.parts)


def buckets(
    weights: Sequence[Weight],
    pieces: Sequence[Optional[Piece]],
    topology: Topology,
    rank: int,
) -> List[Bucket]:
    """What has to be added up, in the same order on all ranks: by node those with the same holders
    together, up to BUCKET_BYTES.
    """
    filled: List[List[int]] = []
    filling: Dict[Tuple[str, bool], List[int]] = {}
    room: Dict[Tuple[str, bool], int] = {}
    for index, (weight, own) in enumerate(zip(weights, pieces)):
        if len(holders_of(weight.kind, topology, rank)) == 1:
            continue
        key = (weight.kind, own is not None)
        size = 4 * math.prod(weight.shape)
        if not topology.reduces_by_node or size > room.get(key, -1):
            filling[key] = []
            filled.append(filling[key])
            room[key] = BUCKET_BYTES
        filling[key].append(index)
        room[key] -= size
    return [_bucket(members, weights, pieces, topology, rank) for members in filled]


def _bucket(
    members: Sequence[int],
    weights: Sequence[Weight],
    pieces: Sequence[Optional[Piece]],
    topology: Topology,
    rank: int,
) -> Bucket:
    axes = [own.cut.axis for own in (pieces[index] for index in members) if own is not None]
    shapes = [list(weights[index].shape) for index in members]
    for shape, axis in zip(shapes, axes):
        shape[0], shape[axis] = shape[axis], shape[0]
    ranks = holders_of(weights[members[0]].kind, topology, rank)
    return Bucket(
        tuple(members),
        tuple(map(tuple, shapes)),
        tuple(axes),
        topology.reduction_levels(ranks, rank),
    )


@dataclass(frozen=True)
class _Operators:
    """What adds up, scatters sums and gathers over a group, as functions of the tensor."""

    total: Callable[[Sequence[int]], Any]
    scatter: Callable[[Sequence[int]], Any]
    gather: Callable[[Sequence[int]], Any]

    @classmethod
    def of(cls, communicator: Communicator, in_graph: bool) -> _Operators:
        if in_graph:
            return cls(communicator.summing, communicator.scattering, communicator.gathering)
        return cls(
            lambda ranks: partial(communicator.all_reduce, ranks=ranks),
            lambda ranks: partial(communicator.reduce_scatter, ranks=ranks),
            lambda ranks: partial(communicator.gather_rows, ranks=ranks),
        )


class SumGradients(nn.Cell):
    """Every gradient's sum over the ranks that hold it, or the piece of it that this rank has.

    Args:
        parameters: whose gradients.
        pieces: of each, or None.
        topology: who holds what.
        communicator: makes the groups, in the same order on all ranks.
        in_graph: whether to use operators that a graph can hold.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        pieces: Sequence[Optional[Piece]],
        topology: Topology,
        communicator: Communicator,
        in_graph: bool,
    ) -> None:
        super().__init__(auto_prefix=False)
        operators = _Operators.of(communicator, in_graph)
        weights = [Weight.of(parameter) for parameter in parameters]
        own = buckets(weights, pieces, topology, communicator.rank)
        self.sums = [_Sum(bucket, operators) for bucket in own]
        self.count = len(own)
        self.places = _places(own, len(weights))

    def construct(self, gradients: Tuple[Tensor, ...]) -> Tuple[Tensor, ...]:
        # A gradient that nobody else has stays where `gradients` has it.
        found = gradients
        for index in range(self.count):
            found = found + self.sums[index](gradients)
        results = []
        for place in self.places:
            results.append(found[place])
        return tuple(results)


class GatherPieces(nn.Cell):
    """Parameters from the pieces that the ranks have updated; arguments as of `SumGradients`."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        pieces: Sequence[Optional[Piece]],
        topology: Topology,
        communicator: Communicator,
        in_graph: bool,
    ) -> None:
        super().__init__(auto_prefix=False)
        operators = _Operators.of(communicator, in_graph)
        weights = [Weight.of(parameter) for parameter in parameters]
        own = [each for each in buckets(weights, pieces, topology, communicator.rank) if each.axes]
        self.gathers = [_Gather(bucket, operators) for bucket in own]
        self.count = len(own)
        self.places = _places(own, len(weights))

    def construct(self, updated: Tuple[Tensor, ...]) -> Tuple[Tensor, ...]:
        """The parameters, those that are updated whole as they are."""
        found = updated
        for index in range(self.count):
            found = found + self.gathers[index](updated)
        results = []
        for place in self.places:
            results.append(found[place])
        return tuple(results)


def _places(own: Sequence[Bucket], count: int) -> List[int]:
    """Where each result is, if the buckets' follow on as many inputs."""
    places = list(range(count))
    for place, member in enumerate(member for bucket in own for member in bucket.members):
        places[member] = count + place
    return places


class _Sum(nn.Cell):
    """A bucket's gradients -> their sums, or this rank's pieces of those."""

    def __init__(self, bucket: Bucket, operators: _Operators) -> None:
        super().__init__()
        self.rows = _Rows(bucket)
        first, last = bucket.levels[0], bucket.levels[-1]
        by_node = len(bucket.levels) == 2
        self.inside = operators.scatter(first) if by_node else nn.Identity()
        self.sum = operators.scatter(last) if bucket.axes else operators.total(last)
        gathers = by_node and not bucket.axes
        self.after = operators.gather(first) if gathers else nn.Identity()
        self.divides = bool(bucket.axes)

    def construct(self, gradients: Tuple[Tensor, ...]) -> Tuple[Tensor, ...]:
        x = self.after(self.sum(self.inside(self.rows.join(gradients))))
        return self.rows.pieces(x) if self.divides else self.rows.apart(x)


class _Gather(nn.Cell):
    """The updated pieces of a bucket's parameters -> the parameters."""

    def __init__(self, bucket: Bucket, operators: _Operators) -> None:
        super().__init__()
        self.rows = _Rows(bucket)
        by_node = len(bucket.levels) == 2
        self.first = operators.gather(bucket.levels[-1])
        self.inside = operators.gather(bucket.levels[0]) if by_node else nn.Identity()

    def construct(self, updated: Tuple[Tensor, ...]) -> Tuple[Tensor, ...]:
        return self.rows.apart(self.inside(self.first(self.rows.join_pieces(updated))))


class _Rows(nn.Cell):
    """A bucket as rows that are scattered and gathered, and back.

    By node the rows for the ranks at the same place in each node follow each other: first a node is
    divided between its ranks, then each rank's rows between the nodes.
    """

    def __init__(self, bucket: Bucket) -> None:
        super().__init__()
        self.bucket_members = list(bucket.members)
        self.count = len(bucket.members)
        self.shapes = list(bucket.shapes)
        self.axes = list(bucket.axes) or [0] * self.count
        self.divided = bool(bucket.axes)
        self.by_node = len(bucket.levels) == 2
        self.alone = bucket.is_alone
        self.parts = bucket.parts
        self.columns = bucket.columns
        self.places = len(bucket.levels[0])  # Q, if it is by node
        self.nodes = len(bucket.levels[-1])
        sizes = [math.prod(shape) for shape in bucket.shapes]
        if self.divided:
            sizes = [size // self.parts for size in sizes]
        self.sizes = sizes
        self.begins = [sum(sizes[:index]) for index in range(self.count)]
        self.padding = 0 if self.divided else self.parts * self.columns - sum(sizes)
        self.piece_shapes = [(shape[0] // self.parts, *shape[1:]) for shape in bucket.shapes]
        self.cut = ops.Slice()
        self.concat = ops.Concat(0)
        self.concat_columns = ops.Concat(1)

    def join(self, gradients: Tuple[Tensor, ...]) -> Tensor:
        """The rows, [parts, M]; the gradient itself where it is alone."""
        if self.alone:
            return with_axis_first(gradients[self.bucket_members[0]], self.axes[0])
        if not self.divided:
            flat = []
            for index in range(self.count):
                flat.append(ops.reshape(gradients[self.bucket_members[index]], (-1,)))
            if self.padding:
                flat.append(ops.zeros((self.padding,), ms.float32))
            joined = self.concat(flat) if len(flat) > 1 else flat[0]
            return ops.reshape(joined, (self.parts, self.columns)) if self.by_node else joined
        rows = []
        for index in range(self.count):
            first = with_axis_first(gradients[self.bucket_members[index]], self.axes[index])
            rows.append(ops.reshape(first, (self.parts, -1)))
        rows_RM = self.concat_columns(rows) if self.count > 1 else rows[0]
        return self._exchanged(rows_RM, self.nodes, self.places) if self.by_node else rows_RM

    def apart(self, x: Tensor) -> Tuple[Tensor, ...]:
        """`join`'s way back."""
        if self.alone:
            return (with_axis_first(x, self.axes[0]),)
        results = []
        if not self.divided:
            flat = ops.reshape(x, (-1,))
            for index in range(self.count):
                part = self.cut(flat, (self.begins[index],), (self.sizes[index],))
                results.append(ops.reshape(part, self.shapes[index]))
            return tuple(results)
        rows_RM = self._exchanged(x, self.places, self.nodes) if self.by_node else x
        for index in range(self.count):
            part = self.cut(rows_RM, (0, self.begins[index]), (self.parts, self.sizes[index]))
            whole = ops.reshape(part, self.shapes[index])
            results.append(with_axis_first(whole, self.axes[index]))
        return tuple(results)

    def pieces(self, x: Tensor) -> Tuple[Tensor, ...]:
        """This rank's pieces from its row."""
        if self.alone:
            return (with_axis_first(x, self.axes[0]),)
        results = []
        for index in range(self.count):
            part = self.cut(x, (0, self.begins[index]), (1, self.sizes[index]))
            piece = ops.reshape(part, self.piece_shapes[index])
            results.append(with_axis_first(piece, self.axes[index]))
        return tuple(results)

    def join_pieces(self, updated: Tuple[Tensor, ...]) -> Tensor:
        """`pieces`' way back."""
        if self.alone:
            return with_axis_first(updated[self.bucket_members[0]], self.axes[0])
        rows = []
        for index in range(self.count):
            first = with_axis_first(updated[self.bucket_members[index]], self.axes[index])
            rows.append(ops.reshape(first, (1, -1)))
        return self.concat_columns(rows) if self.count > 1 else rows[0]

    def _exchanged(self, rows_RM: Tensor, outer: int, inner: int) -> Tensor:
        """Rows by outer, then inner -> by inner, then outer."""
        apart = ops.reshape(rows_RM, (outer, inner, self.columns))
        return ops.reshape(ops.swapaxes(apart, 0, 1), (self.parts, self.columns))
