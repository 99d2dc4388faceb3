"""Which sequences make up which batch: exact proportions, every sequence once per epoch, resumable
from a few numbers.

Everything is a function of the seed and the number of the pick: the same batches come whatever
number of ranks reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional, Union

import numpy as np

from pangu_locmoe.errors import DataError

Pick = tuple[int, int]
"""(domain, number of the sequence in it)"""


class BatchSampler(Iterator[list[Pick]]):
    """Endless batches of `batch_size` picks.

    The i-th pick goes to the domain that lags furthest behind its share (argmax w_d * (i+1) -
    taken_d), so that after any number of picks each domain is within a few sequences of its share.
    Within a domain sequences come in a seeded random order, anew in each epoch of that domain.
    Without a mixture shares are the numbers of sequences, hence every sequence of the corpus comes
    exactly once before any comes again.

    Order in a batch: `iid` shuffled; `domain` so that the n-th of `nodes` equal blocks holds the
    sequences of domains whose home is node n, and its free positions those other nodes have too
    many of; `content` the same with a home for each sequence.
    """

    def __init__(
        self,
        num_sequences: Sequence[int],
        batch_size: int,
        mixture: Optional[Union[Mapping[str, float], Sequence[float]]] = None,
        seed: int = 0,
        nodes: int = 1,
        sharding: str = "iid",
        home_node: Optional[Sequence[int]] = None,
        domains: Optional[Sequence[str]] = None,
        home_of_sequence: Optional[Sequence[np.ndarray]] = None,
    ) -> None:
        """`num_sequences` of each domain; `mixture` in the same order, or by name, which needs
        `domains`.

        `home_node` of each domain; null: domains spread over the nodes in order.
        `home_of_sequence`: for `content`, the node of each sequence of each domain. Raises
        DataError if sizes do not fit.
        """
        self.num_sequences = [int(n) for n in num_sequences]
        self.batch_size = batch_size
        self.seed = seed
        self.nodes = nodes
        self.sharding = sharding
        count = len(self.num_sequences)
        self.home_node = (
            list(home_node) if home_node is not None else [d * nodes // count for d in range(count)]
        )
        if isinstance(mixture, Mapping):
            if domains is None or sorted(domains) != sorted(mixture):
                raise DataError(
                    f"data.mixture has {', '.join(mixture)}, the data "
                    f"{', '.join(domains or ['no names'])}"
                )
            mixture = [mixture[name] for name in domains]
        weights = self.num_sequences if mixture is None else list(mixture)
        if len(weights) != count or len(self.home_node) != count:
            raise DataError(
                f"{count} domains, but {len(weights)} shares in data.mixture and "
                f"{len(self.home_node)} home nodes"
            )
        if batch_size % nodes:
            raise DataError(
                f"a batch of {batch_size} sequences cannot be shared equally by {nodes} nodes"
            )
        # Integers keep the rule exact for any number of picks.
        self._weights = (
            self.num_sequences if mixture is None else [round(w * 10**9) for w in weights]
        )
        self._total = sum(self._weights)
        if (
            self._total <= 0
            or min(self._weights) < 0
            or any(w > 0 and n < 1 for w, n in zip(self._weights, self.num_sequences))
        ):
            raise DataError("every domain with a share above 0 needs at least one sequence")
        if (sharding == "content") != (home_of_sequence is not None):
            raise DataError("sharding by content needs a home for each sequence, and only it does")
        self._home_of_sequence = home_of_sequence
        self._taken = [0] * count
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    @property
    def batches(self) -> int:
        """Batches given so far."""
        return sum(self._taken) // self.batch_size

    def __next__(self) -> list[Pick]:
        number = self.batches
        picks = [self._pick() for _ in range(self.batch_size)]
        if self.sharding != "iid":
            return _by_home(picks, [self._home(pick) for pick in picks], self.nodes)
        order = np.random.default_rng([self.seed, 0, number]).permutation(self.batch_size)
        return [picks[i] for i in order]

    def state_dict(self) -> dict[str, Any]:
        """Where it is, for JSON: a handful of integers."""
        return {
            "taken": list(self._taken),
            "num_sequences": list(self.num_sequences),
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises DataError if it belongs to other data or another seed or batch size.
        """
        for key in ("num_sequences", "batch_size", "seed"):
            if state[key] != getattr(self, key):
                raise DataError(
                    f"cannot continue the data order: {key} was {state[key]}, now it is "
                    f"{getattr(self, key)}"
                )
        self._taken = [int(n) for n in state["taken"]]

    def _home(self, pick: Pick) -> int:
        domain, sequence = pick
        return (
            self.home_node[domain]
            if self._home_of_sequence is None
            else int(self._home_of_sequence[domain][sequence])
        )

    def _pick(self) -> Pick:
        count = sum(self._taken) + 1
        deficits = [
            weight * count - taken * self._total
            for weight, taken in zip(self._weights, self._taken)
        ]
        domain = deficits.index(max(deficits))
        epoch, position = divmod(self._taken[domain], self.num_sequences[domain])
        self._taken[domain] += 1
        return domain, int(self._order(domain, epoch)[position])

    def _order(self, domain: int, epoch: int) -> np.ndarray:
        """The permutation of one epoch of one domain; only the latest is kept."""
        if self._orders.get(domain, (-1,))[0] != epoch:
            rng = np.random.default_rng([self.seed, 1, domain, epoch])
            self._orders[domain] = epoch, rng.permutation(self.num_sequences[domain])
        return self._orders[domain][1]


def _by_home(picks: list[Pick], homes: Sequence[int], nodes: int) -> list[Pick]:
    """Equal blocks, one per node: the sequences at home there first, then what other nodes have
    too many of.
    """
    share = len(picks) // nodes
    ordered = sorted(zip(homes, picks), key=lambda item: (item[0], item[1][0]))
    blocks: list[list[Pick]] = [[] for _ in range(nodes)]
    spare: list[Pick] = []
    for home, pick in ordered:
        block = blocks[home]
        (block if len(block) < share else spare).append(pick)
    for block in blocks:
        missing = share - len(block)
        block += spare[:missing]
        spare = spare[missing:]
    return [pick for block in blocks for pick in block]
