"""Even load inside the step: a bias for each option of a router, found from the batch that it
routes.

A token chooses the K options of the highest score plus bias. An option's bias is right when as many
tokens as are due choose it, which is when it is the quantile of what it would take for each token:
of alpha - s, with s the score and alpha the K-th highest biased score among the other options. All
biases are corrected at once, and each correction moves the others' alpha: so by half, and several
times over.

Quantiles come from histograms around the bias of before, in windows that get narrower. Their counts
are integers, which fp32 adds up exactly to 2^24: their sum over ranks is the same on any number of
them, and so is the bias. (MindSpore's CPU collectives have no integer sum.)

Only while training: a token's expert then depends on the whole batch, as with a capacity its being
dropped does. Evaluation and generation use the bias of the last step.

Letters: T tokens, E experts, X options (experts, or groups of them), K choices of a token, I items
of a histogram, its bins, J domains, M = X * I + J rows of what ranks add up.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common import dtype as mstype

BINS = 64
WINDOWS = (1.0, 0.5, 0.25, 0.125)
"""Half the width of the histogram in each round; scores are probabilities."""

STEPS_OF_ONE = 2.0**20
"""A bias is a multiple of 1 over this: what compilers round differently is gone."""

_FAR = 4e9


class QuantileBalancer(nn.Cell):
    """The two halves of a round; between them ranks add up what they have seen.

    Args:
        options_EX: which experts are behind each option, bool.
        allowed_JE: which experts each domain may use, bool.
        choices: K.
    """

    def __init__(self, options_EX: np.ndarray, allowed_JE: np.ndarray, choices: int) -> None:
        super().__init__()
        allowed = allowed_JE.astype(np.float32)
        share_JX = (
            choices * (allowed @ options_EX.astype(np.float32)) / allowed.sum(1, keepdims=True)
        )
        self.domains, self.options = share_JX.shape
        self.choices = choices
        # An option is due each domain's assignments by its part of the experts that it may use.
        self.share_JX = Tensor(share_JX.astype(np.float32))
        self.windows = [Tensor(window, mstype.float32) for window in WINDOWS]
        self.options_X = Tensor(np.arange(self.options, dtype=np.int32))
        self.domains_J = Tensor(np.arange(self.domains, dtype=np.int32))
        self.bins_I = Tensor(np.arange(BINS, dtype=np.float32))

    def seen(self, scores_TX: Tensor, bias_X: Tensor, domains_T: Tensor, window: Tensor) -> Tensor:
        """This process's tokens: a histogram for each option, and the tokens of each domain,
        integers in fp32 [M].
        """
        needed_TX = self._threshold(scores_TX + bias_X) - scores_TX
        bin_TX = ops.floor((needed_TX - bias_X + window) * (BINS / 2.0 / window))
        bin_TX = ops.cast(ops.minimum(ops.maximum(bin_TX, 0.0), BINS - 1.0), mstype.int32)
        index_M = ops.reshape(bin_TX + self.options_X * BINS, (-1,))
        ones_M = ops.ones_like(ops.cast(index_M, mstype.float32))
        counts_M = ops.unsorted_segment_sum(ones_M, index_M, self.options * BINS)
        of_domain_TJ = ops.equal(ops.expand_dims(domains_T, 1), self.domains_J)
        tokens_J = ops.reduce_sum(ops.cast(of_domain_TJ, mstype.float32), 0)
        return ops.concat((counts_M, tokens_J), 0)

    def corrected(self, seen_M: Tensor, bias_X: Tensor, window: Tensor) -> Tensor:
        """The next bias, fp32 [X], of what all have `seen` with this one."""
        counts_XI = ops.reshape(seen_M[: self.options * BINS], (self.options, BINS))
        tokens_J1 = ops.expand_dims(seen_M[self.options * BINS :], 1)
        due_X1 = ops.expand_dims(ops.reduce_sum(tokens_J1 * self.share_JX, 0), 1)
        up_to_XI = ops.cumsum(counts_XI, 1)
        short_XI = ops.cast(ops.less(up_to_XI, due_X1), mstype.float32)
        bin_X = ops.minimum(ops.reduce_sum(short_XI, 1), BINS - 1.0)
        here_XI = ops.cast(ops.equal(ops.expand_dims(bin_X, 1), self.bins_I), mstype.float32)
        count_X = ops.reduce_sum(counts_XI * here_XI, 1)
        before_X = ops.reduce_sum(up_to_XI * here_XI, 1) - count_X
        inside_X = (ops.squeeze(due_X1, 1) - before_X) / ops.maximum(count_X, 1.0)
        inside_X = ops.minimum(ops.maximum(inside_X, 0.0), 1.0)
        quantile_X = bias_X - window + (bin_X + inside_X) * (window * (2.0 / BINS))
        next_X = (bias_X + quantile_X) * 0.5
        next_X = next_X - ops.reduce_mean(next_X)
        return ops.floor(next_X * STEPS_OF_ONE + 0.5) * (1.0 / STEPS_OF_ONE)

    def _threshold(self, biased_TX: Tensor) -> Tensor:
        """The K-th highest biased score among each token's other options."""
        chosen_TX = ops.zeros_like(biased_TX)
        left_TX = biased_TX
        highest = ops.ReduceMax(keep_dims=True)
        last_T1 = highest(left_TX, 1)  # MindSpore's compiler wants it before the loop
        for _ in range(self.choices):
            last_T1 = highest(left_TX, 1)
            option_T = ops.cast(ops.ArgMaxWithValue(-1)(left_TX)[0], mstype.int32)
            one_hot_TX = ops.cast(
                ops.equal(ops.expand_dims(option_T, 1), self.options_X), mstype.float32
            )
            chosen_TX = chosen_TX + one_hot_TX
            left_TX = left_TX - _FAR * one_hot_TX
        next_T1 = highest(left_TX, 1)
        return last_T1 + chosen_TX * (next_T1 - last_T1)
