"""Sequences of alike content, for nodes that should read alike text where no domain says so.

A sequence's signature is its bag of tokens, weighted by rarity and hashed to a few hundred numbers;
k-means puts the signatures together, and these contents are dealt to the nodes so that all get
nearly as many sequences.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import List

import numpy as np
from scipy.cluster.vq import kmeans2

from pangu_locmoe.data.prepared import Prepared

_WIDTH = 256
_CONTENTS_PER_NODE = 4
_SAMPLE = 8192
_CHUNK = 4096


def nodes_by_content(prepared: Prepared, num_nodes: int, seed: int) -> List[np.ndarray]:
    """For each domain the home node of each of its training sequences, int [sequences].

    Args:
        prepared: the data.
        num_nodes: N; there are four contents for each.
        seed: fixes hashing and k-means.
    """
    content_of = contents_of(prepared, _CONTENTS_PER_NODE * num_nodes, seed)
    node_of_content = deal(np.bincount(np.concatenate(content_of)), num_nodes)
    return [node_of_content[part] for part in content_of]


def contents_of(prepared: Prepared, num_contents: int, seed: int) -> List[np.ndarray]:
    """For each domain the content of each of its training sequences, int [sequences]; contents
    span domains.
    """
    signatures = [_signatures(prepared, domain, seed) for domain in range(len(prepared.domains))]
    everything = np.concatenate(signatures)
    generator = np.random.default_rng([seed, 4])
    sample = everything[generator.permutation(len(everything))[:_SAMPLE]]
    centres, _ = kmeans2(sample, min(num_contents, len(sample)), minit="++", seed=generator)
    ends = np.cumsum([len(part) for part in signatures])[:-1]
    return list(np.split(_nearest(everything, centres), ends))


def deal(sizes: Sequence[int] | np.ndarray, num_nodes: int) -> np.ndarray:
    """The node of each content: the largest first, each to the node with the fewest sequences so
    far.
    """
    heap = [(0, node) for node in range(num_nodes)]
    node_of_content = np.zeros(len(sizes), dtype=np.int64)
    for content in np.argsort(-np.asarray(sizes), kind="stable"):
        filled, node = heapq.heappop(heap)
        node_of_content[content] = node
        heapq.heappush(heap, (filled + int(sizes[content]), node))
    return node_of_content


def _signatures(prepared: Prepared, domain: int, seed: int) -> np.ndarray:
    """fp32 [sequences, _WIDTH], rows of norm 1."""
    counts_V = prepared.token_counts.sum(axis=0)
    rarity_V = np.log((counts_V.sum() + 1) / (counts_V + 1)).astype(np.float32)
    generator = np.random.default_rng([seed, 5])
    column_V = generator.integers(0, _WIDTH, len(counts_V))
    sign_V = generator.choice(np.asarray([-1, 1], np.float32), len(counts_V))
    count = prepared.num_sequences["train"][domain]
    parts = []
    for start in range(0, count, _CHUNK):
        tokens_BS = prepared.sequences("train", domain, range(start, min(start + _CHUNK, count)))
        rows_BS = np.broadcast_to(np.arange(len(tokens_BS))[:, None], tokens_BS.shape)
        flat = rows_BS * _WIDTH + column_V[tokens_BS]
        weights = (rarity_V * sign_V)[tokens_BS]
        bags = np.bincount(flat.ravel(), weights=weights.ravel(), minlength=len(tokens_BS) * _WIDTH)
        parts.append(bags.reshape(-1, _WIDTH).astype(np.float32))
    signatures = np.concatenate(parts)
    return signatures / np.maximum(np.linalg.norm(signatures, axis=1, keepdims=True), 1e-12)


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    squares = (centres**2).sum(axis=1)
    return np.concatenate(
        [
            (squares - 2 * chunk @ centres.T).argmin(axis=1)
            for chunk in np.array_split(points, len(points) // _CHUNK + 1)
        ]
    )
