"""The model over a text that grows: keys and values of the tokens before are kept, so that a new
one costs as much as one token.

A lane is the place of a text. A call computes T tokens of one lane, and nothing else: what stands
in other lanes cannot change a bit of it, as it can where rows of one product are computed together.
T is 1 for the token just drawn, and larger for a prompt.

Letters: T tokens of the call, B prompts, each in its lane, S positions of the sequence that a cache
has room for, D hidden, or one head's part of it, H heads, V vocabulary, X = H*T places of a cache.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from pangu_locmoe.model.attention import Attention
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.capacity import DROPLESS
from pangu_locmoe.nn import functional


class CachedSigma(nn.Cell):
    """Logits after the last of some tokens of a lane, whose keys and values it keeps. No token is
    ever dropped.

    Args:
        model: has its matrices and experts in this process.
        lanes: B.
        room: S, at least the window.
    """

    def __init__(self, model: PanguSigma, lanes: int, room: int) -> None:
        # The model's parameters keep their names, which a checkpoint knows.
        super().__init__(auto_prefix=False)
        self.model = model
        self.num_heads = model.num_heads
        self.room = room
        attentions = [*(block.attention for block in model.blocks), model.query_layer.attention]
        self.attentions = nn.CellList(
            [
                CachedAttention(attention, lanes, room, model.dtype, f"layer{index}")
                for index, attention in enumerate(attentions)
            ],
            auto_prefix=False,
        )
        self.index_S = Tensor(np.arange(room, dtype=np.int32))
        self.heads_H1 = Tensor(np.arange(model.num_heads, dtype=np.int32).reshape(-1, 1))
        self.keys = Tensor(np.zeros(1, np.int32))
        self.norm = ops.LayerNorm(1, 1, model.query_layer.norm1.epsilon)

    def construct(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        domain_1: Tensor,
        lane_1: Tensor,
        last_1: Tensor,
    ) -> Tensor:
        """fp32 [1, V].

        Args:
            tokens_T, positions_T: ids, and positions in their document.
            slots_T: their positions in the lane: what comes after the last must be computed again
                before a later token looks at it.
            domain_1: the text's domain.
            lane_1: which.
            last_1: which of the T is the last.
        """
        model = self.model
        mask_1HTS = self.visible(slots_T - positions_T, slots_T)
        place_X3 = self.places(lane_1, slots_T)
        domains_T = ops.broadcast_to(domain_1, tokens_T.shape)
        # Read once, before anything is written: MindSpore copies a parameter that it reads both before
        # and after a write, whatever is written.
        word_table = ops.stop_gradient(model.word_table)
        x_TD = model.embed_tokens(word_table, tokens_T, domains_T, positions_T)
        for index, block in enumerate(model.blocks):
            normed_TD = self.normed(block.norm1, x_TD)
            x_TD = x_TD + self.attentions[index](normed_TD, normed_TD, mask_1HTS, place_X3, lane_1)
            x_TD = block.feed_forward(
                x_TD,
                self.normed(block.norm2, x_TD),
                tokens_T,
                domains_T,
                (self.keys, self.keys),
                DROPLESS,
                False,
            )[0]
        if model.has_final_norm:
            x_TD = self.normed(model.final_norm, x_TD)
        # Only the last token is asked what comes after it; all of them are keys and values.
        top = model.query_layer
        query_1D = ops.gather(top.query_table, ops.gather(positions_T, last_1, 0), 0)
        slot_1 = ops.gather(slots_T, last_1, 0)
        mask_1H1S = self.visible(slot_1 - ops.gather(positions_T, last_1, 0), slot_1)
        x_1D = ops.gather(x_TD, last_1, 0) + self.attentions[-1](
            ops.cast(query_1D, x_TD.dtype),
            self.normed(top.norm1, x_TD),
            mask_1H1S,
            place_X3,
            lane_1,
        )
        return model.logits(word_table, x_1D + top.ffn(self.normed(top.norm2, x_1D)), domain_1)

    def normed(self, layer: functional.LayerNorm, x_TD: Tensor) -> Tensor:
        """LayerNorm as one operator: its ten are made for gradients and for many rows."""
        wide_TD = ops.cast(x_TD, ms.float32)
        return ops.cast(self.norm(wide_TD, layer.gamma, layer.beta)[0], x_TD.dtype)

    def visible(self, first_T: Tensor, last_T: Tensor) -> Tensor:
        """0 for the slots from a token's first to its last, -3e38 elsewhere, fp32 [1, H, T, S]."""
        index_1S = ops.expand_dims(self.index_S, 0)
        seen_TS = ops.logical_and(
            ops.greater_equal(index_1S, ops.expand_dims(first_T, 1)),
            ops.less_equal(index_1S, ops.expand_dims(last_T, 1)),
        )
        mask_TS = (ops.cast(seen_TS, ms.float32) - 1.0) * 3e38
        return ops.tile(ops.reshape(mask_TS, (1, 1, -1, self.room)), (1, self.num_heads, 1, 1))

    def places(self, lane_1: Tensor, slots_T: Tensor) -> Tensor:
        """Where a cache has these slots of every head: lane, head and slot, int32 [H * T, 3]."""
        count = self.num_heads * slots_T.shape[0]
        return ops.stack(
            (
                ops.broadcast_to(lane_1, (count,)),
                ops.reshape(
                    ops.broadcast_to(self.heads_H1, (self.num_heads, slots_T.shape[0])), (-1,)
                ),
                ops.tile(slots_T, (self.num_heads,)),
            ),
            1,
        )


class CachedAttention(nn.Cell):
    """An attention layer over the tokens of now and before.

    Its cache is a parameter, because that is what MindSpore can write a row of in place.

    Args:
        attention: the layer; the caches are not parameters of its model.
        lanes, room: B and S.
        dtype: of keys and values.
        name: of the layer's caches.
    """

    def __init__(
        self, attention: Attention, lanes: int, room: int, dtype: ms.Type, name: str
    ) -> None:
        super().__init__(auto_prefix=False)
        self.attention = attention
        self.lanes = lanes
        shape = (lanes, attention.num_heads, room, attention.head_size)
        self.key_cache = Parameter(ops.zeros(shape, dtype), f"{name}.key_cache", False)
        self.value_cache = Parameter(ops.zeros(shape, dtype), f"{name}.value_cache", False)
        self.write = ops.ScatterNdUpdate()
        # One query has nothing to gain from a fused operator, whatever the model trains with.
        self.attend = functional.Attention()

    def construct(
        self, query_TD: Tensor, x_TD: Tensor, mask_1HTS: Tensor, place_X3: Tensor, lane_1: Tensor
    ) -> Tensor:
        """Keep keys and values of x_TD in their places, and attend with as many queries as the mask
        has, [T, D].
        """
        query_1HTD, key_1HTD, value_1HTD = self.attention.heads(query_TD, x_TD, 1)
        key_BHSD = self.write(self.key_cache, place_X3, self._rows(key_1HTD))
        value_BHSD = self.write(self.value_cache, place_X3, self._rows(value_1HTD))
        if self.lanes > 1:
            key_BHSD = ops.gather(key_BHSD, lane_1, 0)
            value_BHSD = ops.gather(value_BHSD, lane_1, 0)
        return self.attention.joined(self.attend(query_1HTD, key_BHSD, value_BHSD, mask_1HTS))

    def _rows(self, x_1HTD: Tensor) -> Tensor:
        return ops.reshape(x_1HTD, (-1, x_1HTD.shape[-1]))
