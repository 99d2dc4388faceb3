"""A pangu_locmoe model in PyTorch, for evaluation, generation and fine-tuning: no capacity, so that
no token is ever dropped.

    word + position embedding -> dense blocks -> sparse blocks -> LayerNorm -> query layer -> head
    tied to the word embedding

Which keys a token sees follows from its position in its document: it looks back to position 0. So
documents that share a sequence, and padding on the left, need no mask but their positions.

Letters: B batch, S sequence, X keys (those of the cache included), T = B*S tokens, D hidden, H heads,
V vocabulary, K experts of a token.
"""

from __future__ import annotations

from typing import Any, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_pangu_locmoe import PanguLocMoEConfig
from .routing_pangu_locmoe import ROUTERS

_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Transformers' name for what `past_key_values` was at first; calls may have either."""


def document_positions(
    tokens_BS: Tensor,
    attention_mask_BS: Optional[Tensor],
    eos_token_id: Optional[int],
    last_B: Optional[Tensor] = None,
) -> Tensor:
    """Position of each token in its document, int64 [B, S].

    Args:
        tokens_BS: token ids.
        attention_mask_BS: 0 for padding; None: there is none.
        eos_token_id: the token that begins the next document; None: there is one document.
        last_B: positions of the tokens before these; None, or -1 in a row: there are none.
    """
    batch, length = tokens_BS.shape
    index_S = torch.arange(length, device=tokens_BS.device)
    if last_B is None:
        last_B = index_S.new_full((batch,), -1)
    real_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    if attention_mask_BS is not None:
        real_BS = attention_mask_BS.bool()
    is_first_BS = real_BS & (real_BS.cumsum(1) == 1) & (last_B < 0)[:, None]
    begins_BS = is_first_BS
    if eos_token_id is not None:
        begins_BS = begins_BS | (real_BS & (tokens_BS == eos_token_id))
    # Before any beginning, the document goes on that began -last_B - 1 tokens before these.
    before_B1 = -(last_B + 1)[:, None]
    start_BS = torch.where(begins_BS, index_S, before_B1).cummax(1).values
    return (index_S - start_BS) * real_BS


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d) + mask) V, projected; queries of `query_BSD`, keys and values of
    `x_BSD`.
    """

    def __init__(self, config: PanguLocMoEConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.num_heads = config.num_attention_heads
        width = config.hidden_size
        self.w_query = nn.Linear(width, width, bias=False)
        self.w_key_value = nn.Linear(width, 2 * width, bias=False)
        self.w_out = nn.Linear(width, width, bias=False)

    def forward(
        self, query_BSD: Tensor, x_BSD: Tensor, mask_B1SX: Tensor, cache: Optional[Cache]
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Returns the output [B, S, D], and with eager attention the weights [B, H, S, X]."""
        query_BHSD = self._heads(self.w_query(query_BSD))
        key_BHXD, value_BHXD = map(self._heads, self.w_key_value(x_BSD).chunk(2, -1))
        if cache is not None:
            key_BHXD, value_BHXD = cache.update(key_BHXD, value_BHXD, self.layer)
        if key_BHXD.shape[2] > mask_B1SX.shape[3]:  # a cache of a fixed size, with empty places
            mask_B1SX = F.pad(mask_B1SX, (0, key_BHXD.shape[2] - mask_B1SX.shape[3]))
        weights_BHSX = None
        if self.config._attn_implementation == "eager":
            scores_BHSX = (query_BHSD * query_BHSD.shape[-1] ** -0.5) @ key_BHXD.transpose(2, 3)
            scores_BHSX = scores_BHSX.float().masked_fill(~mask_B1SX, float("-inf"))
            weights_BHSX = scores_BHSX.softmax(-1).to(value_BHXD.dtype)
            mixed_BHSD = weights_BHSX @ value_BHXD
        else:
            mixed_BHSD = F.scaled_dot_product_attention(
                query_BHSD, key_BHXD, value_BHXD, attn_mask=mask_B1SX
            )
        mixed_BSD = mixed_BHSD.transpose(1, 2).reshape(x_BSD.shape)
        return self.w_out(mixed_BSD), weights_BHSX

    def _heads(self, x_BSD: Tensor) -> Tensor:
        batch, length, width = x_BSD.shape
        return x_BSD.view(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2)


class FeedForward(nn.Module):
    """y = GELU(x W_in) W_out; `networks` of them side by side are one of as many times the width."""

    def __init__(self, config: PanguLocMoEConfig, networks: int = 1) -> None:
        super().__init__()
        inner = networks * config.intermediate_size
        self.w_in = nn.Linear(config.hidden_size, inner, bias=False)
        self.w_out = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x_XD: Tensor) -> Tensor:
        return self.w_out(F.gelu(self.w_in(x_XD), approximate="tanh"))


class SparseFeedForward(nn.Module):
    """y = weight * expert(x), summed over a token's experts, none of which ever is full."""

    def __init__(self, config: PanguLocMoEConfig) -> None:
        super().__init__()
        self.router = ROUTERS[config.router](config)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.num_experts))

    def forward(self, x_TD: Tensor, tokens_T: Tensor, domains_T: Tensor) -> Tensor:
        expert_TK, weight_TK = self.router(x_TD.float(), tokens_T, domains_T)
        y_TD = torch.zeros_like(x_TD)
        for expert in expert_TK.unique().tolist():
            if expert < 0:
                continue
            token_X, choice_X = torch.where(expert_TK == expert)
            weight_X1 = weight_TK[token_X, choice_X, None].to(x_TD.dtype)
            y_TD = y_TD.index_add(0, token_X, self.experts[expert](x_TD[token_X]) * weight_X1)
        return y_TD


class DecoderBlock(nn.Module):
    """x = x + Attn(LN1(x)); x = x + FFN(LN2(x)), dense or sparse."""

    def __init__(self, config: PanguLocMoEConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.attention = Attention(config, layer)
        self.norm2 = nn.LayerNorm(config.hidden_size)
        self.sparse = layer >= config.num_hidden_layers - 1 - config.num_moe_layers
        self.shared = self.sparse and config.shared_experts > 0
        if self.sparse:
            self.moe = SparseFeedForward(config)
        else:
            self.ffn = FeedForward(config)
        if self.shared:
            self.shared_ffn = FeedForward(config, config.shared_experts)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BSD: Tensor,
        mask_B1SX: Tensor,
        tokens_T: Tensor,
        domains_T: Tensor,
        cache: Optional[Cache],
    ) -> Tuple[Tensor, Optional[Tensor]]:
        normed_BSD = self.norm1(x_BSD)
        attended_BSD, weights_BHSX = self.attention(normed_BSD, normed_BSD, mask_B1SX, cache)
        x_BSD = x_BSD + self.dropout(attended_BSD)
        normed_BSD = self.norm2(x_BSD)
        if self.sparse:
            y_BSD = self.moe(normed_BSD.flatten(0, 1), tokens_T, domains_T).view_as(x_BSD)
        else:
            y_BSD = self.ffn(normed_BSD)
        if self.shared:
            y_BSD = y_BSD + self.shared_ffn(normed_BSD)
        return x_BSD + self.dropout(y_BSD), weights_BHSX


class QueryLayer(nn.Module):
    """PanGu-alpha's top layer: queries come from a learned table indexed by the position to
    predict.
    """

    def __init__(self, config: PanguLocMoEConfig) -> None:
        super().__init__()
        self.query_table = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.attention = Attention(config, config.num_hidden_layers - 1)
        self.norm2 = nn.LayerNorm(config.hidden_size)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BSD: Tensor, mask_B1SX: Tensor, positions_BS: Tensor, cache: Optional[Cache]
    ) -> Tuple[Tensor, Optional[Tensor]]:
        attended_BSD, weights_BHSX = self.attention(
            self.query_table(positions_BS), self.norm1(x_BSD), mask_B1SX, cache
        )
        x_BSD = x_BSD + self.dropout(attended_BSD)
        return x_BSD + self.dropout(self.ffn(self.norm2(x_BSD))), weights_BHSX


class PanguLocMoEPreTrainedModel(PreTrainedModel):
    config_class = PanguLocMoEConfig
    base_model_prefix = "model"
    _no_split_modules = ["DecoderBlock", "QueryLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)


class PanguLocMoEModel(PanguLocMoEPreTrainedModel):
    """The decoder: hidden states after the query layer."""

    def __init__(self, config: PanguLocMoEConfig) -> None:
        super().__init__(config)
        slots = len(config.domains) if config.domain_embeddings else 1
        self.word_table = nn.Embedding(slots * config.vocab_size, config.hidden_size)
        self.position_table = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(
            DecoderBlock(config, layer) for layer in range(config.num_hidden_layers - 1)
        )
        if config.final_norm:
            self.final_norm = nn.LayerNorm(config.hidden_size)
        self.query_layer = QueryLayer(config)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_table

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.word_table = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        past_key_values: Optional[Cache] = None,
        domain_ids: Union[Tensor, int, None] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        cache: Optional[Cache] = None,
    ) -> Union[BaseModelOutputWithPast, Tuple[Any, ...]]:
        """Hidden states of the new tokens.

        Args:
            input_ids: new tokens, int64 [B, S].
            attention_mask: 0 for padding, of all tokens, those in the cache included, [B, X].
            position_ids: position of each new token in its document, [B, S]; attention looks back
                to position 0. None: documents begin at the first token and, with
                `config.reset_at_document_end`, at each `config.eos_token_id`.
            past_key_values, cache: keys and values of the tokens before these, under either name.
            domain_ids: the domain of each sequence, [B], or of all; None:
                `config.default_domain_id`.
            use_cache, output_attentions, output_hidden_states, return_dict: as everywhere in
                Transformers.
        """
        config = self.config
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        positions_BS, mask_B1SX = self._positions_and_mask(
            input_ids, attention_mask, position_ids, cache
        )
        domains_B = self.domains(domain_ids, input_ids)
        domains_T = domains_B.repeat_interleave(input_ids.shape[1])
        tokens_T = input_ids.flatten()
        slots_B1 = domains_B[:, None] * (config.vocab_size if config.domain_embeddings else 0)
        x_BSD = self.word_table(slots_B1 + input_ids) + self.position_table(positions_BS)
        x_BSD = self.dropout(x_BSD)

        hidden_states: List[Tensor] = [x_BSD]
        attentions: List[Any] = []
        for block in self.blocks:
            x_BSD, weights_BHSX = block(x_BSD, mask_B1SX, tokens_T, domains_T, cache)
            hidden_states.append(x_BSD)
            attentions.append(weights_BHSX)
        if config.final_norm:
            x_BSD = self.final_norm(x_BSD)
        x_BSD, weights_BHSX = self.query_layer(x_BSD, mask_B1SX, positions_BS, cache)
        hidden_states.append(x_BSD)
        attentions.append(weights_BHSX)
        output = BaseModelOutputWithPast(
            last_hidden_state=x_BSD,
            **{_CACHE: cache if use_cache else None},
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output if return_dict is not False else output.to_tuple()

    def positions(
        self,
        input_ids: Tensor,
        attention_mask: Optional[Tensor] = None,
        last: Optional[Tensor] = None,
    ) -> Tensor:
        """As `document_positions`, by this model's configuration."""
        end = self.config.eos_token_id if self.config.reset_at_document_end else None
        return document_positions(input_ids, attention_mask, end, last)

    def domains(self, domain_ids: Union[Tensor, int, None], input_ids: Tensor) -> Tensor:
        """The domain of each sequence, int64 [B].

        Raises:
            ValueError: there is no such domain.
        """
        if domain_ids is None:
            domain_ids = self.config.default_domain_id
        domains_B = torch.as_tensor(domain_ids, dtype=torch.int64, device=input_ids.device)
        last = len(self.config.domains) - 1
        if not ((domains_B >= 0) & (domains_B <= last)).all():
            raise ValueError(f"domain_ids = {domains_B.tolist()}: must be from 0 to {last}")
        return domains_B.expand(len(input_ids))

    def word_embeddings(self, domains_B: Tensor) -> Tensor:
        """The head's rows, [V, D], or [B, V, D] where each domain has its own."""
        table_XD = self.word_table.weight
        if not self.config.domain_embeddings:
            return table_XD
        return table_XD.view(-1, self.config.vocab_size, table_XD.shape[1])[domains_B]

    def _positions_and_mask(
        self,
        input_ids: Tensor,
        attention_mask: Optional[Tensor],
        position_ids: Optional[Tensor],
        cache: Optional[Cache],
    ) -> Tuple[Tensor, Tensor]:
        """positions_BS, and which keys each token sees, bool [B, 1, S, X]."""
        batch, length = input_ids.shape
        past = 0 if cache is None else int(cache.get_seq_length())
        if attention_mask is not None and attention_mask.shape != (batch, past + length):
            raise ValueError(
                f"attention_mask has the shape {list(attention_mask.shape)}: must be "
                f"{[batch, past + length]}, with the {past} tokens of the cache"
            )
        if position_ids is None:
            new_BS = None if attention_mask is None else attention_mask[:, past:]
            position_ids = self.positions(input_ids, new_BS, _last_positions(cache, past, batch))
        position_ids = position_ids.expand(batch, length)
        if past + length > self.config.max_position_embeddings:
            last = int(position_ids.max())
            if last >= self.config.max_position_embeddings:
                raise ValueError(
                    f"position {last} of a document: the model has positions up to "
                    f"{self.config.max_position_embeddings - 1}"
                )
        if cache is not None:
            _remember_positions(cache, past, position_ids)
        index_X = torch.arange(past + length, device=input_ids.device)
        index_S = index_X[past:]
        start_BS1 = (index_S - position_ids)[:, :, None]
        is_seen_BSX = (index_X >= start_BS1) & (index_X <= index_S[:, None])
        if attention_mask is not None:
            # Padding sees itself: a softmax over nothing is not a number.
            is_seen_BSX &= attention_mask.bool()[:, None] | (index_X == index_S[:, None])
        return position_ids, is_seen_BSX[:, None]


def _remember_positions(cache: Cache, past: int, positions_BS: Tensor) -> None:
    """Keep the positions beside the keys, for a call that brings none."""
    before_BX = getattr(cache, "positions", None)
    if past and before_BX is not None and len(before_BX) == len(positions_BS):
        positions_BS = torch.cat([before_BX[:, :past], positions_BS], 1)
    elif past:
        return
    cache.positions = positions_BS  # type: ignore[attr-defined]


def _last_positions(cache: Optional[Cache], past: int, batch: int) -> Optional[Tensor]:
    """Position of the last token in the cache, [B]; None: it is empty.

    Raises:
        ValueError: it is not known.
    """
    if past == 0:
        return None
    positions_BX = getattr(cache, "positions", None)
    if positions_BX is None or len(positions_BX) != batch or positions_BX.shape[1] < past:
        raise ValueError(
            "position_ids are needed with these past_key_values: model.model.positions(all ids "
            "so far, attention_mask) has them"
        )
    return positions_BX[:, past - 1]


class PanguLocMoEForCausalLM(PanguLocMoEPreTrainedModel, GenerationMixin):
    """The decoder and its head, which is the word table."""

    def __init__(self, config: PanguLocMoEConfig) -> None:
        super().__init__(config)
        self.model = PanguLocMoEModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        past_key_values: Optional[Cache] = None,
        domain_ids: Union[Tensor, int, None] = None,
        labels: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        logits_to_keep: Union[int, Tensor] = 0,
        cache: Optional[Cache] = None,
        **loss_arguments: Any,
    ) -> Union[CausalLMOutputWithPast, Tuple[Any, ...]]:
        """Logits for the next token, fp32 [B, S, V].

        Args:
            labels: as input_ids, -100 where a token is no target; with them there is a loss. The
                routers' own losses are not part of it.
            logits_to_keep: logits of the last so many tokens, or of those with these indices; 0:
                of all.
            loss_arguments: what the Trainer says about the batch.

        The other arguments are those of the decoder.
        """
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            domain_ids,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
            cache,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x_BSD = output.last_hidden_state[:, kept]
        words = self.model.word_embeddings(self.model.domains(domain_ids, input_ids))
        logits_BSV = (x_BSD @ words.mT).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits_BSV,
                labels=labels,
                vocab_size=self.config.vocab_size,
                **loss_arguments,
            )
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            **{_CACHE: output.get(_CACHE)},
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result if return_dict is not False else result.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Optional[Cache] = None,
        attention_mask: Optional[Tensor] = None,
        domain_ids: Union[Tensor, int, None] = None,
        use_cache: Optional[bool] = None,
        cache: Optional[Cache] = None,
        **others: Any,
    ) -> dict:
        """The tokens that the cache has not, and their positions, found from all tokens."""
        cache = past_key_values if cache is None else cache
        past = 0 if cache is None else int(cache.get_seq_length())
        if attention_mask is None or attention_mask.shape == input_ids.shape:
            position_ids = self.model.positions(input_ids, attention_mask)[:, past:]
            input_ids = input_ids[:, past:]
        else:  # a part of a long prompt, whose beginning is in the cache
            position_ids = None
        passed_on = ("logits_to_keep", "output_attentions", "output_hidden_states", "return_dict")
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": cache,
            "domain_ids": domain_ids,
            "use_cache": use_cache,
            **{name: others[name] for name in passed_on if name in others},
        }
