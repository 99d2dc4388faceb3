"""Configuration of a pangu_locmoe model that was exported to Hugging Face."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

from transformers import PretrainedConfig


class PanguLocMoEConfig(PretrainedConfig):
    """A PanGu-Sigma-style decoder with a query layer on top and sparse blocks below it.

    Args:
        vocab_size: tokens in the vocabulary; the tokenizer may have fewer.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of a feed-forward network and of an expert.
        num_hidden_layers: all layers, the query layer included.
        num_moe_layers: the top blocks below the query layer that are sparse.
        num_attention_heads: heads of attention.
        max_position_embeddings: tokens of the longest document, or piece of one.
        dropout: on embeddings, attention output and feed-forward output while training.
        initializer_range: standard deviation of weights that no checkpoint gives.
        final_norm: whether there is a LayerNorm between the blocks and the query layer.
        reset_at_document_end: attention and positions start anew at each `eos_token_id`.
        domains: names of the domains; `domain_ids` of a call are indices into it.
        default_domain_id: the domain where a call has no `domain_ids`.
        domain_embeddings: whether each domain has word embeddings of its own.
        router: hash, local_hash, switch, locmoe or locmoe_plus.
        num_experts: of each sparse block.
        num_experts_per_tok: the most experts of a token.
        shared_experts: experts that every token has besides.
        expert_groups: the experts [first, stop) that each domain may use; None: all.
        router_weight: what an expert's output is multiplied by: probability, normalized or unit.
        router_bias: whether experts are chosen by probability plus a stored bias.
        gate_scale: of the logits of grouped average pooling.
        gate_blocks: blocks of features that are pooled.
        first_gate_block: the block of the first expert.
        num_groups: groups of experts with something for each of them.
        group_of_expert: which of them each expert is in; None: there are none.
        token_prior: added to the logit of the expert that a table has for the token; 0: none.
        learn_token_prior: whether each token has its own, a weight.
        token_choice_threshold: locmoe_plus: a token has the fewest experts whose probabilities
            add up to this.
        training_config: the configuration it was trained with, and what its checkpoint said, for
            the way back (`pangu-locmoe import-hf`).
    """

    model_type = "pangu_locmoe"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 8192,
        hidden_size: int = 256,
        intermediate_size: int = 1024,
        num_hidden_layers: int = 5,
        num_moe_layers: int = 0,
        num_attention_heads: int = 4,
        max_position_embeddings: int = 256,
        dropout: float = 0.0,
        initializer_range: float = 0.02,
        final_norm: bool = True,
        reset_at_document_end: bool = True,
        domains: Optional[List[str]] = None,
        default_domain_id: int = 0,
        domain_embeddings: bool = False,
        router: str = "locmoe",
        num_experts: int = 8,
        num_experts_per_tok: int = 1,
        shared_experts: int = 0,
        expert_groups: Optional[List[List[int]]] = None,
        router_weight: str = "probability",
        router_bias: bool = False,
        gate_scale: float = 1.0,
        gate_blocks: int = 8,
        first_gate_block: int = 0,
        num_groups: int = 1,
        group_of_expert: Optional[List[int]] = None,
        token_prior: float = 0.0,
        learn_token_prior: bool = False,
        token_choice_threshold: float = 0.5,
        training_config: Optional[dict] = None,
        bos_token_id: int = 0,
        eos_token_id: int = 0,
        pad_token_id: int = 0,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_moe_layers = num_moe_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.dropout = dropout
        self.initializer_range = initializer_range
        self.final_norm = final_norm
        self.reset_at_document_end = reset_at_document_end
        self.domains = [""] if domains is None else domains
        self.default_domain_id = default_domain_id
        self.domain_embeddings = domain_embeddings
        self.router = router
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.shared_experts = shared_experts
        self.expert_groups = expert_groups
        self.router_weight = router_weight
        self.router_bias = router_bias
        self.gate_scale = gate_scale
        self.gate_blocks = gate_blocks
        self.first_gate_block = first_gate_block
        self.num_groups = num_groups
        self.group_of_expert = group_of_expert
        self.token_prior = token_prior
        self.learn_token_prior = learn_token_prior
        self.token_choice_threshold = token_choice_threshold
        self.training_config = training_config
        self.use_cache = use_cache
        tokens: Dict[str, Any] = {
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
        }
        # The head is the word table itself, not a second one that is tied to it.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**tokens, **kwargs)
