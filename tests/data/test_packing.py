from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pangu_locmoe.data.packing import Packer, positions_and_segments

END = 0
documents = st.lists(st.lists(st.integers(1, 9), max_size=20), max_size=10)


@given(documents=documents, length=st.integers(1, 12), chunk=st.integers(1, 4))
def test_windows_of_the_stream(documents: list[list[int]], length: int, chunk: int) -> None:
    packer = Packer(length, END)
    got = [
        row.tolist()
        for i in range(0, len(documents), chunk)
        for row in packer.add(documents[i : i + chunk])
    ]
    stream = [token for document in documents for token in [END, *document]]
    expected = [stream[i : i + length + 1] for i in range(0, len(stream) - length, length)]
    assert got == expected
    assert packer.tokens == len(stream) and packer.sequences == len(expected)
    assert packer.unused_tokens == len(stream) - (len(expected) * length + 1 if expected else 0)


@given(documents=documents, length=st.integers(1, 12))
def test_padded_every_token_but_the_first_is_a_target_once(
    documents: list[list[int]], length: int
) -> None:
    packer = Packer(length, END)
    rows = np.concatenate([packer.add(documents), packer.pad()])
    assert rows.dtype == np.int32
    stream = [token for document in documents for token in [END, *document]]
    targets = rows[:, 1:].reshape(-1).tolist()
    assert targets[: len(stream) - 1] == stream[1:]
    assert set(targets[max(len(stream) - 1, 0) :]) <= {END}
    assert (rows[1:, 0] == rows[:-1, -1]).all()
    assert packer.unused_tokens == 0 and packer.sequences == len(rows)


@given(
    rows=st.integers(1, 12).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(0, 2), min_size=n, max_size=n), min_size=1, max_size=4
        )
    )
)
def test_positions_and_segments(rows: list[list[int]]) -> None:
    tokens = np.array(rows, np.int32)
    positions, segments = positions_and_segments(tokens, END, reset=True)
    assert positions.dtype == segments.dtype == np.int32
    for row, position_S, segment_S in zip(rows, positions.tolist(), segments.tolist()):
        position = segment = 0
        for i, token in enumerate(row):
            if i and token == END:
                position, segment = 0, segment + 1
            elif i:
                position += 1
            assert (position_S[i], segment_S[i]) == (position, segment)
    positions, segments = positions_and_segments(tokens, END, reset=False)
    assert (positions == np.arange(tokens.shape[1])).all() and (segments == 0).all()
