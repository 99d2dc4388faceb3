"""Sequences -> batches of arrays, and a place to continue from.

B = batch, S = sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from pangu_locmoe.data.packing import positions_and_segments
from pangu_locmoe.data.prepared import Prepared
from pangu_locmoe.data.sampler import BatchSampler, Pick


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs. int32, `valid_B` bool."""

    tokens_BS: np.ndarray
    targets_BS: np.ndarray
    """The token after each of `tokens_BS`."""
    positions_BS: np.ndarray
    segments_BS: np.ndarray
    """Number of the document in its sequence; attention stays within equal numbers."""
    domains_B: np.ndarray
    valid_B: np.ndarray
    """False for sequences that only fill up the batch."""


@dataclass(frozen=True)
class ValidationBatch(Batch):
    """A batch of which not every target is text."""

    documents_BS: np.ndarray
    """Number in its side of the document each target belongs to, int64; -1 where the target only
    fills up.
    """


class BatchLoader(Iterator[Batch]):
    """Endless training batches.

    Reads ahead, but its state is that of the batches it has handed out.
    """

    def __init__(
        self,
        prepared: Prepared,
        sampler: BatchSampler,
        reset: bool,
        end_of_document: Optional[int] = None,
        read_ahead: int = 64,
    ) -> None:
        """`reset`: positions and segments start anew at each `<eod>`.

        `read_ahead`: batches read from disk at a time.
        """
        self._prepared = prepared
        self._sampler = sampler
        self._reset = reset
        self._end = (
            prepared.tokenizer.end_of_document if end_of_document is None else end_of_document
        )
        self._read_ahead = read_ahead
        self._state = sampler.state_dict()
        self._ready: deque[tuple[Batch, dict[str, Any]]] = deque()

    def __next__(self) -> Batch:
        if not self._ready:
            self._read()
        batch, self._state = self._ready.popleft()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """After the last batch handed out; a few integers for JSON."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after that batch. Raises DataError if the state belongs to other data."""
        self._sampler.load_state_dict(state)
        self._state = self._sampler.state_dict()
        self._ready.clear()

    def _read(self) -> None:
        plan = []
        for _ in range(self._read_ahead):
            picks = next(self._sampler)
            plan.append((picks, self._sampler.state_dict()))
        rows = _rows(self._prepared, [pick for picks, _ in plan for pick in picks])
        for picks, state in plan:
            sequences = np.stack([rows[pick] for pick in picks])
            domains = np.array([domain for domain, _ in picks], np.int32)
            self._ready.append(
                (_batch(sequences, domains, len(picks), self._end, self._reset), state)
            )


def validation_batches(
    prepared: Prepared, per_domain: int, batch_size: int, reset: bool
) -> Iterator[tuple[int, ValidationBatch]]:
    """Yield (domain, batch): `per_domain` validation sequences of each domain, spread over it,
    always the same ones.

    Every batch has `batch_size` rows of one domain; the last of a domain repeats a sequence with
    `valid_B` False.
    """
    for domain, available in enumerate(prepared.num_sequences["validation"]):
        chosen = spread(per_domain, available)
        for start in range(0, len(chosen), batch_size):
            numbers = chosen[start : start + batch_size]
            sequences = prepared.sequences("validation", domain, numbers)
            filling = np.minimum(np.arange(batch_size), len(numbers) - 1)
            domains = np.full(batch_size, domain, np.int32)
            batch = _batch(
                sequences[filling], domains, len(numbers), prepared.tokenizer.end_of_document, reset
            )
            documents_BS = prepared.target_documents(domain, numbers)[filling]
            documents_BS[~batch.valid_B] = -1
            yield domain, ValidationBatch(**vars(batch), documents_BS=documents_BS)


def spread(count: int, available: int) -> list[int]:
    """The middle sequence of each of `count` equal stretches of a side; all of them where there are
    no more.

    Every text has its part, so that the sample's mean is the side's, and no document gives a
    second sequence unless it is longer than a stretch.
    """
    count = min(count, available)
    return [(2 * number + 1) * available // (2 * count) for number in range(count)]


def _rows(prepared: Prepared, picks: Sequence[Pick]) -> dict[Pick, np.ndarray]:
    rows: dict[Pick, np.ndarray] = {}
    for domain in sorted({domain for domain, _ in picks}):
        numbers = sorted({number for other, number in picks if other == domain})
        rows.update(
            ((domain, number), row)
            for number, row in zip(numbers, prepared.sequences("train", domain, numbers))
        )
    return rows


def _batch(
    sequences: np.ndarray, domains_B: np.ndarray, valid: int, end_of_document: int, reset: bool
) -> Batch:
    tokens_BS = np.ascontiguousarray(sequences[:, :-1])
    positions_BS, segments_BS = positions_and_segments(tokens_BS, end_of_document, reset)
    targets_BS = np.ascontiguousarray(sequences[:, 1:])
    return Batch(
        tokens_BS,
        targets_BS,
        positions_BS,
        segments_BS,
        domains_B,
        np.arange(len(domains_B)) < valid,
    )
