"""Slices of arrays, and the vocabulary divided over ranks, against the whole."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor, ops

from pangu_locmoe.model.vocabulary import Vocabulary
from pangu_locmoe.parallel.communicator import SingleProcess
from pangu_locmoe.parallel.tensor import Cut, TensorGroup, cut_of

T = 7
V = 12
D = 5


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.data(),
)
def test_slices_make_up_the_whole(shape, blocks, size, width, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    shape[axis] = blocks * size * width
    whole = np.arange(np.prod(shape)).reshape(shape)
    cut = Cut(axis, blocks)
    parts = [cut.part(whole, position, size) for position in range(size)]
    assert all(part.shape == (*shape[:axis], blocks * width, *shape[axis + 1 :]) for part in parts)
    np.testing.assert_array_equal(cut.whole(parts), whole)


def test_a_head_keeps_its_keys_and_values_together():
    """Columns k0 k1 k2 k3 v0 v1 v2 v3 on two ranks."""
    np.testing.assert_array_equal(Cut(1, 2).part(np.arange(8)[None], 1, 2), [[2, 3, 6, 7]])


def test_only_a_divided_parameter_has_a_cut():
    alone = TensorGroup.alone()
    second = Half(1)
    assert cut_of(alone.parameter(np.ones((4, 4), np.float32), "w", Cut(1))) is None
    parameter = second.parameter(np.arange(8, dtype=np.float32).reshape(2, 4), "w", Cut(1))
    assert cut_of(parameter) == Cut(1)
    np.testing.assert_array_equal(parameter.asnumpy(), [[2, 3], [6, 7]])


class Half(TensorGroup):
    """One of two ranks.

    Its sums are those in `known`, and zero from the first on that is not known yet; `asked` is what
    it added.
    """

    def __init__(self, position, known=()):
        super().__init__(SingleProcess(), [0])
        self.size = 2
        self.position = position
        self.known = known
        self.asked = []
        self.sum = self._sum

    leave = leave_rows = property(lambda self: self._sum)

    def _sum(self, x):
        self.asked.append(x.asnumpy())
        number = len(self.asked) - 1
        return Tensor(self.known[number]) if number < len(self.known) else ops.zeros_like(x)


def on_both(make, *inputs):
    """make(group)(*inputs[position]) on both ranks: again and again, each time with one more sum
    known.
    """
    known: list[np.ndarray] = []
    while True:
        groups = [Half(position, known) for position in (0, 1)]
        returned = [make(group)(*[value[group.position] for value in inputs]) for group in groups]
        if len(groups[0].asked) == len(known):
            return returned
        known.append(groups[0].asked[len(known)] + groups[1].asked[len(known)])


@pytest.fixture(scope="module")
def random():
    return np.random.default_rng(3)


def test_the_loss_and_its_gradient_are_those_of_the_whole_vocabulary(random):
    logits_TV = random.normal(0, 20, (T, V)).astype(np.float32)
    targets_T = random.integers(0, V, T).astype(np.int32)
    halves = [Tensor(half) for half in np.split(logits_TV, 2, axis=1)]

    def loss(group):
        vocabulary = Vocabulary(V, group)
        targets = Tensor(targets_T)
        mean = lambda logits: vocabulary.cross_entropy(logits, targets)  # noqa: E731
        return lambda logits: (
            *ms.value_and_grad(mean)(logits),
            vocabulary.token_losses(logits, targets),
        )

    shifted = (logits_TV - logits_TV.max(1, keepdims=True)).astype(float)
    log_softmax = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    wanted_T = -log_softmax[np.arange(T), targets_T]
    gradient = (np.exp(log_softmax) - np.eye(V)[targets_T]) / T
    for position, (mean, slope, losses) in enumerate(on_both(loss, halves)):
        np.testing.assert_allclose(losses.asnumpy(), wanted_T, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(mean.asnumpy(), wanted_T.mean(), rtol=1e-6)
        np.testing.assert_allclose(
            slope.asnumpy(), np.split(gradient, 2, axis=1)[position], rtol=1e-5, atol=1e-7
        )


def test_embeddings_and_logits_are_those_of_the_whole_table(random):
    """Two domains with a table each."""
    table_VD = random.normal(size=(2 * V, D)).astype(np.float32)
    tokens_T = random.integers(0, V, T)
    domains_T = random.integers(0, 2, T)
    parts = [Tensor(Cut(0, 2).part(table_VD, position, 2)) for position in (0, 1)]
    ids = [Tensor(ids.astype(np.int32)) for ids in (tokens_T, domains_T)]

    def embed(group):
        vocabulary = Vocabulary(V, group)
        return lambda table: vocabulary.embed(table, *ids)

    for rows_TD in on_both(embed, parts):
        np.testing.assert_array_equal(rows_TD.asnumpy(), table_VD[domains_T * V + tokens_T])
    logits_BV = random.normal(size=(3, V)).astype(np.float32)
    for whole in on_both(
        lambda group: Vocabulary(V, group).whole,
        [Tensor(half) for half in np.split(logits_BV, 2, axis=1)],
    ):
        np.testing.assert_array_equal(whole.asnumpy(), logits_BV)
