from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.texts import make_text

from pangu_locmoe.data.alike import Sketcher, groups_of_alike
from pangu_locmoe.data.copies import RUN, CopiedRuns
from pangu_locmoe.data.hashing import window_hashes


@given(values=st.lists(st.integers(0, 3), max_size=60), size=st.integers(1, 9))
def test_equal_windows_have_equal_hashes_and_others_do_not(values: list[int], size: int) -> None:
    hashes = window_hashes(np.array(values, np.int64), size)
    windows = [tuple(values[i : i + size]) for i in range(len(values) - size + 1)]
    assert len(hashes) == len(windows) and len(set(hashes.tolist())) == len(set(windows))
    assert len(set(zip(hashes.tolist(), windows))) == len(set(windows))


def groups(texts: list[str]) -> list[int]:
    sketcher = Sketcher()
    return groups_of_alike(np.stack([sketcher.sketch(text.encode()) for text in texts])).tolist()


def edited(text: str, kind: str) -> str:
    rng = random.Random(7)
    words = text.split(" ")
    changes = {
        "one word in fifty": lambda: " ".join(
            "other" if rng.random() < 0.02 else word for word in words
        ),
        "other lines": lambda: text.replace("\n", " ").replace(" the ", "\nthe "),
        "capitals": lambda: text.upper(),
        "header": lambda: "Copyright of somebody else, all rights reserved.\n" + text,
        "end cut off": lambda: text[: int(0.85 * len(text))],
    }
    return changes[kind]()


@pytest.mark.parametrize(
    "kind", ["one word in fifty", "other lines", "capitals", "header", "end cut off"]
)
def test_near_copies_are_alike_and_other_documents_are_not(kind: str) -> None:
    originals = [make_text("en", i, 600) for i in range(10)]
    found = groups([*originals, *(edited(text, kind) for text in originals)])
    assert len(set(found[:10])) == 10
    assert sum(a == b for a, b in zip(found[:10], found[10:])) >= 9


def test_groups_do_not_depend_on_the_order_and_join_through_a_third() -> None:
    parts = [make_text("en", i, 100) for i in range(14)]
    chain = ["".join(parts[i : i + 8]) for i in range(7)]  # neighbours share 7 parts, the ends one
    texts = [*chain, make_text("en", 50, 600), "short", "short one"]
    found = groups(texts)
    assert len(set(found[:7])) == 1 and len(set(found)) == 4
    again = groups(texts[::-1])[::-1]
    assert [[x == y for y in found] for x in found] == [[x == y for y in again] for x in again]


def covered(held_out: list[int], training: list[list[int]]) -> int:
    """By the definition: tokens in a stretch of RUN tokens that a training document has too."""
    known = {
        tuple(tokens[i : i + RUN]) for tokens in training for i in range(len(tokens) - RUN + 1)
    }
    starts = [i for i in range(len(held_out) - RUN + 1) if tuple(held_out[i : i + RUN]) in known]
    return len({i + j for i in starts for j in range(RUN)})


@given(seed=st.integers(0, 10_000))
def test_copied_runs_are_counted_exactly(seed: int) -> None:
    rng = random.Random(seed)

    def stretch() -> list[int]:
        return [rng.randrange(1, 50) for _ in range(rng.choice([1, 20, RUN - 1, RUN, RUN + 1, 90]))]

    shared = [stretch() for _ in range(3)]
    held_out = [
        [token for part in rng.choices([*shared, stretch()], k=3) for token in part]
        for _ in range(4)
    ]
    training = [
        [token for part in rng.choices([*shared, stretch()], k=3) for token in part]
        for _ in range(4)
    ]
    runs = CopiedRuns([100, 100])
    for i, tokens in enumerate(held_out):
        runs.hold(i % 2, [b"x"], [np.array(tokens, np.int32)])
    for tokens in training:
        runs.search([np.array(tokens, np.int32)], 0)
    for domain, (searched, copied) in enumerate(runs.counts()):
        mine = held_out[domain::2]
        assert searched == sum(map(len, mine)) and copied == sum(
            covered(tokens, training) for tokens in mine
        )


def test_runs_do_not_reach_over_the_end_of_a_document_and_a_sample_bounds_the_memory() -> None:
    tokens = np.arange(1, 2 * RUN - 1, dtype=np.int32)
    runs = CopiedRuns([10])
    runs.hold(0, [b"x"], [tokens])
    runs.search([tokens[: RUN - 1], tokens[RUN - 1 :]], 0)
    assert runs.counts() == [(len(tokens), 0)]
    sampled = CopiedRuns([320_000_000])
    for i in range(400):
        sampled.hold(0, [str(i).encode()], [tokens])
    assert 20 < sampled.counts()[0][0] / len(tokens) < 60
