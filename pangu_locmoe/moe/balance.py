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

Letters: T tokens, E experts, O options (experts, or groups of them), K choices of a token, B bins,
J domains.
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
        options_EO: which experts are behind each option, bool.
        allowed_JE: which experts each domain may use, bool.
        choices: K.
    """

    def __init__(self, options_EO: np.ndarray, allowed_JE: np.ndarray, choices: int) -> None:
        super().__init__()
        allowed = allowed_JE.astype(np.float32)
        share_JO = (
            choices * (allowed @ options_EO.astype(np.float32)) / allowed.sum(1, keepdims=True)
        )
        self.domains, self.options = share_JO.shape
        self.choices = choices
        # An option is due each domain's assignments by its part of the experts that it may use.
        self.share_JO = Tensor(share_JO.astype(np.float32))
        self.windows = [Tensor(window, mstype.float32) for window in WINDOWS]
        self.options_O = Tensor(np.arange(self.options, dtype=np.int32))
        self.domains_J = Tensor(np.arange(self.domains, dtype=np.int32))
        self.bins_B = Tensor(np.arange(BINS, dtype=np.float32))

    def seen(self, scores_TO: Tensor, bias_O: Tensor, domains_T: Tensor, window: Tensor) -> Tensor:
        """This process's tokens: a histogram for each option, and the tokens of each domain,
        integers in fp32 [O * B + J].
        """
        needed_TO = self._threshold(scores_TO + bias_O) - scores_TO
        bin_TO = ops.floor((needed_TO - bias_O + window) * (BINS / 2.0 / window))
        bin_TO = ops.cast(ops.minimum(ops.maximum(bin_TO, 0.0), BINS - 1.0), mstype.int32)
        index_X = ops.reshape(bin_TO + self.options_O * BINS, (-1,))
        ones_X = ops.ones_like(ops.cast(index_X, mstype.float32))
        counts_X = ops.unsorted_segment_sum(ones_X, index_X, self.options * BINS)
        of_domain_TJ = ops.equal(ops.expand_dims(domains_T, 1), self.domains_J)
        tokens_J = ops.reduce_sum(ops.cast(of_domain_TJ, mstype.float32), 0)
        return ops.concat((counts_X, tokens_J), 0)

    def corrected(self, seen_X: Tensor, bias_O: Tensor, window: Tensor) -> Tensor:
        """The next bias, fp32 [O], of what all have `seen` with this one."""
        counts_OB = ops.reshape(seen_X[: self.options * BINS], (self.options, BINS))
        tokens_J1 = ops.expand_dims(seen_X[self.options * BINS :], 1)
        due_O1 = ops.expand_dims(ops.reduce_sum(tokens_J1 * self.share_JO, 0), 1)
        up_to_OB = ops.cumsum(counts_OB, 1)
        short_OB = ops.cast(ops.less(up_to_OB, due_O1), mstype.float32)
        bin_O = ops.minimum(ops.reduce_sum(short_OB, 1), BINS - 1.0)
        here_OB = ops.cast(ops.equal(ops.expand_dims(bin_O, 1), self.bins_B), mstype.float32)
        count_O = ops.reduce_sum(counts_OB * here_OB, 1)
        before_O = ops.reduce_sum(up_to_OB * here_OB, 1) - count_O
        inside_O = (ops.squeeze(due_O1, 1) - before_O) / ops.maximum(count_O, 1.0)
        inside_O = ops.minimum(ops.maximum(inside_O, 0.0), 1.0)
        quantile_O = bias_O - window + (bin_O + inside_O) * (window * (2.0 / BINS))
        next_O = (bias_O + quantile_O) * 0.5
        next_O = next_O - ops.reduce_mean(next_O)
        return ops.floor(next_O * STEPS_OF_ONE + 0.5) * (1.0 / STEPS_OF_ONE)

    def _threshold(self, biased_TO: Tensor) -> Tensor:
        """The K-th highest biased score among each token's other options."""
        chosen_TO = ops.zeros_like(biased_TO)
        left_TO = biased_TO
        highest = ops.ReduceMax(keep_dims=True)
        last_T1 = highest(left_TO, 1)
        for _ in range(self.choices):
            last_T1 = highest(left_TO, 1)
            option_T = ops.cast(ops.ArgMaxWithValue(-1)(left_TO)[0], mstype.int32)
            one_hot_TO = ops.cast(
                ops.equal(ops.expand_dims(option_T, 1), self.options_O), mstype.float32
            )
            chosen_TO = chosen_TO + one_hot_TO
            left_TO = left_TO - _FAR * one_hot_TO
        next_T1 = highest(left_TO, 1)
        return last_T1 + chosen_TO * (next_T1 - last_T1)
