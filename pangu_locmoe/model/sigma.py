"""The PanGu-Sigma model, top to bottom on one page.

    word + position embedding -> dense blocks -> sparse blocks -> LayerNorm -> query layer -> head
    tied to the word embedding

The LayerNorm between the blocks and the query layer is `model.final_norm`.

Letters: B batch, S sequence, T = B*S tokens, M of them on this rank (all without sequence
parallelism), D hidden, V vocabulary, L MoE layers, N source nodes, E experts, J domains.
"""

from __future__ import annotations

from typing import Any, Dict, Optional, Tuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from pangu_locmoe.config import Config
from pangu_locmoe.model.attention import attention_mask
from pangu_locmoe.model.block import DecoderBlock, QueryLayer, RowDropout
from pangu_locmoe.model.vocabulary import Vocabulary
from pangu_locmoe.moe.domains import allowed_experts
from pangu_locmoe.moe.routers.base import RouterContext
from pangu_locmoe.nn import flash_attention as fused
from pangu_locmoe.nn.functional import LayerNorm
from pangu_locmoe.nn.init import normal
from pangu_locmoe.nn.noise import Noise
from pangu_locmoe.parallel.exchange import Exchange
from pangu_locmoe.parallel.tensor import Cut, TensorGroup
from pangu_locmoe.parallel.topology import Topology

DTYPES = {"fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16}
LOSSES = ("balance_loss", "locality_loss", "z_loss")
# What a layer reports -> what the model reports of all layers.
REPORTED = {
    "load_NE": "load_LNE",
    "dropped_E": "dropped_LE",
    "cosine_T": "cosine_LT",
    "weight": "weight_L",
    "unrouted": "unrouted_L",
    "bias_X": "bias_LX",
}


class PanguSigma(nn.Cell):
    """A decoder whose top `num_moe_layers` blocks below the query layer are sparse.

    Args:
        config: every size comes from here.
        token_counts_JV: occurrences of each token in each domain's training text, int64 [J, V],
            which balance the hash router's table; None: all alike.
        topology: where the experts are; None: in this process.
        exchange: the way to experts in other processes; None: there are none. With it the model
            runs in PyNative, its parts between the exchanges compiled by `compile_parts`.
        tensor: the ranks that share the matrices; None: this one has them to itself.
    """

    def __init__(
        self,
        config: Config,
        token_counts_JV: Optional[np.ndarray] = None,
        topology: Optional[Topology] = None,
        exchange: Optional[Exchange] = None,
        tensor: Optional[TensorGroup] = None,
    ) -> None:
        super().__init__()
        model = config.model
        allowed_JE = allowed_experts(config)
        num_domains = len(allowed_JE)
        if token_counts_JV is None:
            token_counts_JV = np.ones((num_domains, model.vocab_size), dtype=np.int64)
        self.tensor = tensor = tensor or TensorGroup.alone()
        self.hidden_size = model.hidden_size
        self.num_heads = model.num_heads // tensor.size
        self.dropout = RowDropout(model.dropout, tensor)
        self.dtype = DTYPES[config.train.precision]
        self.per_domain = model.domain_embeddings
        slots = num_domains if self.per_domain else 1
        seed = config.train.seed
        words = normal([seed, 4], (slots * model.vocab_size, model.hidden_size), model.init_std)
        self.word_table = tensor.parameter(words, "word_table", Cut(0, slots))
        self.vocabulary = Vocabulary(model.vocab_size, tensor)
        self.position_table = Parameter(
            Tensor(normal([seed, 5], (model.seq_length, model.hidden_size), model.init_std)),
            name="position_table",
        )
        self.position_table.has_partial_gradient = tensor.divides_rows
        num_dense = model.num_layers - 1 - model.num_moe_layers
        topology = topology or Topology.from_config(config)
        blocks = []
        for index in range(model.num_layers - 1):
            context = (
                RouterContext(index - num_dense, allowed_JE, topology, token_counts_JV)
                if index >= num_dense
                else None
            )
            block = DecoderBlock(config, index, tensor, context, exchange)
            if config.train.recompute:
                block.recompute_activations()
            blocks.append(block)
        self.blocks = nn.CellList(blocks)
        self.num_dense = num_dense
        self.has_final_norm = model.final_norm
        if self.has_final_norm:
            self.final_norm = tensor.for_own_rows(LayerNorm(model.hidden_size))
        self.query_layer = QueryLayer(config, model.num_layers - 1, tensor)
        self.fused = fused.used(config)
        if self.fused:
            for attention in (*(block.attention for block in blocks), self.query_layer.attention):
                attention.attend = fused.FlashAttention()
        self.causal_SS = Tensor(
            np.tril(np.ones((model.seq_length, model.seq_length), dtype=np.float32))
        )
        self.enter = tensor.enter_rows
        self.own_rows_of = tensor.own_rows_of
        self.head = ops.MatMul(transpose_b=True)
        self.batch_head = ops.BatchMatMul(transpose_b=True)

    def construct(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor,
        domains_B: Tensor,
        noise: Noise,
        capacities: Tuple[int, ...],
        training: bool,
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Logits for the next token at each position, and what the routers report.

        Args:
            tokens_BS, positions_BS, segments_BS: int32; attention stays inside a segment.
            domains_B: the domain of each sequence, int32. N equal contiguous runs of sequences, one
                for each source node.
            noise: keys of this step's randomness; used only while training.
            capacities: slots for each expert in each MoE layer, DROPLESS for as many as come;
                constants of the graph.
            training: a constant of the graph.

        Returns:
            logits_TV in fp32 (this rank's part of V, which `vocabulary` knows what to do with), and
            a dict of fp32 tensors: balance_loss, locality_loss, z_loss (sums over MoE layers, not
            weighted), load_LNE, dropped_LE, cosine_LT, weight_L (without MoE layers these four are
            absent), unrouted_L (only with several experts for a token), bias_LX (only while
            training with moe.balance: quantile), layer_sums (one number for
            each layer, finite exactly where its output is).
        """
        # Keys come one by one here and below: a compiled part would take a tuple of tensors for a
        # constant.
        x_MD, mask_BHSS, tokens_T, domains_T = self.embed(
            tokens_BS, positions_BS, segments_BS, domains_B, noise[0], noise[1], training
        )
        layer_stats = []
        layer_sums = []
        for index, block in enumerate(self.blocks):
            capacity = capacities[index - self.num_dense] if index >= self.num_dense else 0
            x_MD, stats = block(x_MD, mask_BHSS, tokens_T, domains_T, noise, capacity, training)
            layer_sums.append(_checksum(x_MD))
            if index >= self.num_dense:
                layer_stats.append(stats)
        logits_TV, last_sum = self.predict(
            x_MD, mask_BHSS, positions_BS, domains_B, noise[0], noise[1], training
        )
        layer_sums.append(last_sum)
        return logits_TV, _gather_stats(layer_stats, ops.stack(layer_sums))

    def embed(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor,
        domains_B: Tensor,
        row_keys_T: Tensor,
        column_keys_D: Tensor,
        training: bool,
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the blocks start from: x_MD, mask_BHSS, tokens_T, domains_T."""
        batch, length = tokens_BS.shape
        tokens_T = ops.reshape(tokens_BS, (batch * length,))
        domains_T = ops.reshape(
            ops.broadcast_to(ops.expand_dims(domains_B, 1), (batch, length)), (batch * length,)
        )
        positions_M = self.own_rows_of(ops.reshape(positions_BS, (batch * length,)))
        x_MD = self.embed_tokens(self.word_table, tokens_T, domains_T, positions_M)
        x_MD = self.dropout(x_MD, row_keys_T, column_keys_D, 0, training)
        causal_SS = self.causal_SS[:length, :length]
        mask = (
            fused.discard_mask(segments_BS, causal_SS)
            if self.fused
            else attention_mask(segments_BS, causal_SS, self.num_heads)
        )
        return x_MD, mask, tokens_T, domains_T

    def embed_tokens(
        self, word_table: Tensor, tokens_T: Tensor, domains_T: Tensor, positions_M: Tensor
    ) -> Tensor:
        """Word and position embedding of this rank's rows, x_MD in the precision of the run."""
        slot_T = domains_T if self.per_domain else ops.zeros_like(domains_T)
        x_MD = self.vocabulary.embed(word_table, tokens_T, slot_T) + ops.gather(
            self.position_table, positions_M, 0
        )
        return ops.cast(x_MD, self.dtype)

    def predict(
        self,
        x_MD: Tensor,
        mask_BHSS: Tensor,
        positions_BS: Tensor,
        domains_B: Tensor,
        row_keys_T: Tensor,
        column_keys_D: Tensor,
        training: bool,
    ) -> Tuple[Tensor, Tensor]:
        """The final norm, the query layer and the head: logits_TV in fp32, and the layer's sum."""
        batch, length = positions_BS.shape
        if self.has_final_norm:
            x_MD = self.final_norm(x_MD)
        x_MD = self.query_layer(
            x_MD,
            mask_BHSS,
            ops.reshape(positions_BS, (batch * length,)),
            (row_keys_T, column_keys_D),
            training,
        )
        return self.logits(self.word_table, x_MD, domains_B), _checksum(x_MD)

    def logits(self, word_table: Tensor, x_MD: Tensor, domains_B: Tensor) -> Tensor:
        """The head, tied to the word embedding: logits_TV in fp32, as many rows for each sequence."""
        table = ops.cast(word_table, x_MD.dtype)
        entered_TD = self.enter(x_MD)
        if not self.per_domain:
            return ops.cast(self.head(entered_TD, table), ms.float32)
        width = self.vocabulary.width
        table_BVD = ops.gather(ops.reshape(table, (-1, width, self.hidden_size)), domains_B, 0)
        entered_BSD = ops.reshape(entered_TD, (domains_B.shape[0], -1, self.hidden_size))
        logits_BSV = self.batch_head(entered_BSD, table_BVD)
        return ops.cast(ops.reshape(logits_BSV, (-1, width)), ms.float32)

    @property
    def stats_names(self) -> Tuple[str, ...]:
        """The keys of the statistics that `construct` returns."""
        layers = list(self.moe_layers.values())
        if not layers:
            return (*LOSSES, "layer_sums")
        reported = {
            "unrouted_L": layers[0].router.choices > 1,
            "bias_LX": layers[0].balances,
        }
        names = (name for name in REPORTED.values() if reported.get(name, True))
        return (*LOSSES, "layer_sums", *names)

    @property
    def moe_layers(self) -> Dict[str, Any]:
        """The MoE layers by name, bottom to top."""
        return {
            f"blocks.{index}.moe": block.moe
            for index, block in enumerate(self.blocks)
            if block.sparse
        }

    def compile_parts(self) -> None:
        """Compile what lies between the exchanges of a model that is not compiled as a whole."""
        for part in ("embed", "predict"):
            setattr(self, part, ms.jit(getattr(self, part)))
        for block in self.blocks:
            block.attend = ms.jit(block.attend)
            if block.sparse:
                block.moe.compile_parts()
                block.shared = ms.jit(block.shared)
            else:
                block.ffn.construct = ms.jit(block.ffn.construct)


def _checksum(x_MD: Tensor) -> Tensor:
    return ops.stop_gradient(ops.reduce_sum(ops.cast(x_MD, ms.float32)))


def _gather_stats(layer_stats: list, layer_sums: Tensor) -> Dict[str, Tensor]:
    gathered = {"layer_sums": layer_sums}
    if len(layer_stats) == 0:
        for name in LOSSES:
            gathered[name] = ops.zeros((), ms.float32)
        return gathered
    for name in LOSSES:
        gathered[name] = ops.reduce_sum(ops.stack([stats[name] for stats in layer_stats]))
    for source, name in REPORTED.items():
        if source not in layer_stats[0]:
            continue
        gathered[name] = ops.stop_gradient(ops.stack([stats[source] for stats in layer_stats]))
    return gathered
