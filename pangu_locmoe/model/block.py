"""The two kinds of layers: the decoder block (dense or sparse) and PanGu-alpha's query layer on
top.

Letters: B batch, S sequence, T = B*S tokens, M of them on this rank (all without sequence
parallelism), D hidden, F inner width.
"""

from __future__ import annotations

from typing import Optional, Tuple

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from pangu_locmoe.config import Config, ModelConfig
from pangu_locmoe.model.attention import Attention
from pangu_locmoe.moe.layer import MoELayer, MoEStats
from pangu_locmoe.moe.routers.base import RouterContext
from pangu_locmoe.nn.functional import Gelu, LayerNorm
from pangu_locmoe.nn.init import normal
from pangu_locmoe.nn.noise import Noise, dropout
from pangu_locmoe.parallel.exchange import Exchange
from pangu_locmoe.parallel.tensor import Cut, TensorGroup


class FeedForward(nn.Cell):
    """y = GELU(x W_in) W_out, dense. Its input has entered the tensor-parallel group.

    `networks` of them side by side are one of as many times the inner width.
    """

    def __init__(
        self, config: ModelConfig, seed: list[int], tensor: TensorGroup, networks: int = 1
    ) -> None:
        super().__init__()
        out_std = config.init_std / np.sqrt(2 * config.num_layers)
        inner = networks * config.ffn_size
        self.w_in = tensor.parameter(
            normal([*seed, 3], (config.hidden_size, inner), config.init_std), "w_in", Cut(1)
        )
        self.w_out = tensor.parameter(
            normal([*seed, 4], (inner, config.hidden_size), float(out_std)), "w_out", Cut(0)
        )
        self.leave = tensor.leave_rows
        self.gelu = Gelu()
        self.matmul = ops.MatMul()

    def construct(self, x_TD: Tensor) -> Tensor:
        inner_TF = self.gelu(self.matmul(x_TD, ops.cast(self.w_in, x_TD.dtype)))
        return self.leave(self.matmul(inner_TF, ops.cast(self.w_out, x_TD.dtype)))


class DecoderBlock(nn.Cell):
    """x = x + Attn(LN1(x)); x = x + FFN(LN2(x)).

    With a router context the feed-forward network is an MoE layer, and moe.shared_experts, which
    every token has, beside it (DeepSeekMoE, arXiv 2401.06066, section 3.2).
    """

    def __init__(
        self,
        config: Config,
        index: int,
        tensor: TensorGroup,
        context: Optional[RouterContext],
        exchange: Optional[Exchange] = None,
    ) -> None:
        super().__init__()
        seed = [config.train.seed, 0, index]
        self.site = 2 * index + 1
        self.dropout = RowDropout(config.model.dropout, tensor)
        self.norm1 = tensor.for_own_rows(LayerNorm(config.model.hidden_size))
        self.attention = Attention(config.model, seed, tensor)
        self.norm2 = tensor.for_own_rows(LayerNorm(config.model.hidden_size))
        self.sparse = context is not None
        self.enter = tensor.enter_rows
        self.own_rows = tensor.own_rows
        self.enter2 = tensor.whole_rows if self.sparse else tensor.enter_rows
        if context is not None:
            self.moe = MoELayer.of(config, context, exchange, tensor)
            self.has_shared = config.moe.shared_experts > 0
            if self.has_shared:
                self.enter_shared = tensor.enter
                self.shared_ffn = FeedForward(
                    config.model, [*seed, 6], tensor, config.moe.shared_experts
                )
        else:
            self.ffn = FeedForward(config.model, seed, tensor)

    def recompute_activations(self) -> None:
        """Recompute everything but the routing in the backward pass: MindSpore cannot recompute
        a cell that returns a dict.
        """
        for part in (
            self.norm1,
            self.attention,
            self.norm2,
            self.moe.experts if self.sparse else self.ffn,
        ):
            part.recompute()
        if self.sparse and self.has_shared:
            self.shared_ffn.recompute()
        self.attention.attend.keep_no_probabilities()

    def construct(
        self,
        x_MD: Tensor,
        mask_BHSS: Tensor,
        tokens_T: Tensor,
        domains_T: Tensor,
        noise: Noise,
        capacity: int,
        training: bool,
    ) -> Tuple[Tensor, MoEStats]:
        """Returns x_MD and the MoE layer's statistics, an empty dict from a dense block."""
        x_MD, normed_TD = self.attend(x_MD, mask_BHSS, noise[0], noise[1], training)
        return self.feed_forward(x_MD, normed_TD, tokens_T, domains_T, noise, capacity, training)

    def feed_forward(
        self,
        x_MD: Tensor,
        normed_TD: Tensor,
        tokens_T: Tensor,
        domains_T: Tensor,
        noise: Noise,
        capacity: int,
        training: bool,
    ) -> Tuple[Tensor, MoEStats]:
        """The block's second half: x + FFN of what `attend` normed, and the statistics."""
        stats = {}
        if self.sparse:
            y_TD, stats = self.moe(normed_TD, tokens_T, domains_T, noise, capacity, training)
            y_MD = self.own_rows(y_TD)
            if self.has_shared:
                y_MD = y_MD + self.shared(normed_TD)
        else:
            y_MD = self.ffn(normed_TD)
        return x_MD + self.dropout(y_MD, noise[0], noise[1], self.site + 1, training), stats

    def shared(self, normed_TD: Tensor) -> Tensor:
        """What the shared experts add, y_MD."""
        y_MD: Tensor = self.shared_ffn(self.enter_shared(normed_TD))
        return y_MD

    def attend(
        self,
        x_MD: Tensor,
        mask_BHSS: Tensor,
        row_keys_T: Tensor,
        column_keys_D: Tensor,
        training: bool,
    ) -> Tuple[Tensor, Tensor]:
        """The block's first half: x + Attn(LN1(x)) as x_MD, and its LN2 as normed_TD."""
        normed_TD = self.enter(self.norm1(x_MD))
        attended_MD = self.attention(normed_TD, normed_TD, mask_BHSS)
        x_MD = x_MD + self.dropout(attended_MD, row_keys_T, column_keys_D, self.site, training)
        return x_MD, self.enter2(self.norm2(x_MD))


class QueryLayer(nn.Cell):
    """PanGu-alpha's top layer: queries come from a learned table indexed by the position to
    predict.

    a = Attn(Q = table[position], K = V = LN1(H)); x = H + a; out = x + FFN(LN2(x)). Row i of the
    table asks for the token after position i.
    """

    def __init__(self, config: Config, index: int, tensor: TensorGroup) -> None:
        super().__init__()
        model = config.model
        seed = [config.train.seed, 0, index]
        self.site = 2 * index + 1
        self.dropout = RowDropout(model.dropout, tensor)
        self.query_table = Parameter(
            Tensor(normal([*seed, 5], (model.seq_length, model.hidden_size), model.init_std)),
            name="query_table",
        )
        self.norm1 = tensor.for_own_rows(LayerNorm(model.hidden_size))
        self.attention = Attention(model, seed, tensor)
        self.norm2 = tensor.for_own_rows(LayerNorm(model.hidden_size))
        self.enter = tensor.enter
        self.enter_keys = tensor.enter_rows
        self.enter2 = tensor.enter_rows
        self.ffn = FeedForward(model, seed, tensor)

    def construct(
        self, x_MD: Tensor, mask_BHSS: Tensor, positions_T: Tensor, noise: Noise, training: bool
    ) -> Tensor:
        query_TD = ops.cast(ops.gather(self.query_table, positions_T, 0), x_MD.dtype)
        attended_MD = self.attention(
            self.enter(query_TD), self.enter_keys(self.norm1(x_MD)), mask_BHSS
        )
        x_MD = x_MD + self.dropout(attended_MD, noise[0], noise[1], self.site, training)
        y_MD = self.ffn(self.enter2(self.norm2(x_MD)))
        return x_MD + self.dropout(y_MD, noise[0], noise[1], self.site + 1, training)


class RowDropout(nn.Cell):
    """Dropout on this rank's rows while training; the identity otherwise and at rate 0."""

    def __init__(self, rate: float, tensor: TensorGroup) -> None:
        super().__init__()
        self.rate = rate
        self.own_rows_of = tensor.own_rows_of

    def construct(
        self, x_MD: Tensor, row_keys_T: Tensor, column_keys_D: Tensor, site: int, training: bool
    ) -> Tensor:
        if not training or self.rate == 0:
            return x_MD
        return dropout(x_MD, self.rate, (self.own_rows_of(row_keys_T), column_keys_D), site)
