"""Every key of the YAML, its default and its meaning on one line, as typed models."""

from __future__ import annotations

from typing import Annotated, Any, Dict, List, Literal, Optional, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_SEED = 2**63 - 1
"""What everything that is seeded, and every reader of JSON's integers, can hold: 63 bits."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class ModelConfig(Section):
    vocab_size: int = Field(
        8192,
        ge=257,
        description="tokens in the vocabulary; 256 bytes and the end-of-document token at least",
    )
    hidden_size: int = Field(256, ge=1, description="D, width of the residual stream")
    num_layers: int = Field(5, ge=2, description="all layers, the query layer included")
    num_moe_layers: int = Field(
        2, ge=0, description="the top decoder blocks below the query layer that are sparse"
    )
    num_heads: int = Field(4, ge=1, description="H, attention heads")
    ffn_size: int = Field(
        1024, ge=1, description="F, inner width of a feed-forward network and of an expert"
    )
    seq_length: int = Field(256, ge=2, description="S, tokens in a sequence")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="on embeddings, attention output and feed-forward output"
    )
    domain_embeddings: bool = Field(
        False, description="one word-embedding slot per domain instead of a shared one"
    )
    final_norm: bool = Field(
        True,
        description=(
            "a LayerNorm between the decoder blocks and the query layer, as the released "
            "PanGu-alpha has; checkpoints of versions without this key have none"
        ),
    )
    init_std: float = Field(
        0.02,
        gt=0,
        description=(
            "standard deviation of the initial weights; residual outputs get it divided by "
            "sqrt(2*num_layers)"
        ),
    )


class CapacityConfig(Section):
    policy: Literal["factor", "bound", "dynamic", "dropless"] = Field(
        "factor",
        description=(
            "factor: ceil(factor*tokens/experts); bound: LocMoE's lower bound, measured once "
            "after warm-up; dynamic: LocMoE+'s, measured again and again; dropless: never drop"
        ),
    )
    factor: float = Field(
        1.25,
        gt=0,
        description=(
            "capacity factor c_f; below 1 tokens are dropped even when all experts are equally "
            "loaded; for `bound` and `dynamic`, the upper clamp"
        ),
    )
    statistic: Union[Literal["min", "median", "mean", "max"], float] = Field(
        "median",
        description=(
            "bound, dynamic: which statistic (or quantile in [0, 1]) of the cosines between "
            "tokens and their gate is delta"
        ),
    )
    warmup_steps: int = Field(
        100,
        ge=1,
        description=(
            "bound, dynamic: steps before delta is first measured; routing swings wildly in "
            "the first 50"
        ),
    )
    every: Optional[int] = Field(
        None, ge=1, description="dynamic: steps between measurements; null: 100"
    )
    hysteresis: Optional[float] = Field(
        None,
        ge=0,
        description="dynamic: change the capacity only by more than this fraction of it; null: 0.2",
    )
    max_drop: Optional[float] = Field(
        None,
        ge=0,
        le=1,
        description=(
            "bound, dynamic: the capacity stays, up to the factor's, large enough to drop at "
            "most this fraction of the tokens of the measured step; 1: the bound alone; null: 0.05"
        ),
    )
    drop_order: Literal["affinity", "position"] = Field(
        "affinity",
        description=(
            "which tokens lose when an expert is full: the lowest affinity, or the last position"
        ),
    )
    local_factor: Union[Annotated[float, Field(gt=0)], Literal["auto"], None] = Field(
        None,
        description=(
            "capacity factor for sources in the expert's node (static exchange); auto: follows "
            "the measured counts"
        ),
    )
    remote_factor: Union[Annotated[float, Field(gt=0)], Literal["auto"], None] = Field(
        None,
        description=(
            "capacity factor for sources in other nodes (static exchange); auto: follows the "
            "measured counts"
        ),
    )

    @property
    def allowed_drop(self) -> float:
        """max_drop, its default resolved."""
        return 0.05 if self.max_drop is None else self.max_drop


class TokenChoiceConfig(Section):
    threshold: float = Field(
        0.5,
        gt=0,
        le=1,
        description=(
            "a token proposes to the fewest experts whose router probabilities add up to this; "
            "a small one means top-1"
        ),
    )
    max_experts: int = Field(
        2,
        ge=1,
        description="K, the most experts a token proposes to; cost of dispatch grows with it",
    )
    transition_steps: int = Field(
        0,
        ge=0,
        description=(
            "steps in which an expert's capacity shrinks by halves from all tokens (token "
            "choice) to moe.capacity's (expert choice); 0: the latter from the start"
        ),
    )


class CutFromConfig(Section):
    num_experts: int = Field(ge=1, description="experts of each sparse layer of the whole model")
    first_expert: int = Field(ge=0, description="where the sub-model's experts begin in it")


class MoEConfig(Section):
    router: str = Field(
        "locmoe",
        description=(
            "hash | switch | locmoe | locmoe_plus | local_hash, or module:Class of your own, "
            "found in the working directory or on the Python path"
        ),
    )
    num_experts: int = Field(8, ge=1, description="E, experts in each sparse layer")
    levels: int = Field(
        2,
        ge=1,
        le=2,
        description=(
            "2: a token may only go to its domain's expert group; 1: one group of all experts"
        ),
    )
    group_sizes: Optional[Dict[str, int]] = Field(
        None, description="experts of each domain's group (levels: 2); null: as many for each"
    )
    node_groups: Optional[int] = Field(
        None,
        ge=1,
        description=(
            "groups of as many consecutive experts each, one for each node that the model is "
            "made for: local_hash's gate chooses among them, and moe.token_prior has a table for "
            "each (locmoe, locmoe_plus); belongs to the model wherever it runs; null: "
            "parallel.nodes, and the run's own configuration has the number"
        ),
    )
    top_k: int = Field(
        1, ge=1, description="K, experts of a token (switch, locmoe); the most likely ones"
    )
    weight: Optional[Literal["probability", "normalized", "unit"]] = Field(
        None,
        description=(
            "what an expert's output is multiplied by. probability: the router's; normalized: "
            "divided by the sum over the token's experts; unit: the same, with no gradient "
            "through the sum, so that one expert has weight 1 (local_hash: 1, and no gradient at "
            "all); null: unit for local_hash, else probability"
        ),
    )
    shared_experts: int = Field(
        0,
        ge=0,
        description="experts of each sparse layer that every token has besides its own, weight 1",
    )
    token_prior: float = Field(
        0.0,
        ge=0,
        description=(
            "beta, added to the logit that the token has in a hash table (switch, locmoe, "
            "locmoe_plus; with a locality loss one table for each of moe.node_groups): learned "
            "routing that starts as a hash table; 0: none"
        ),
    )
    learn_token_prior: bool = Field(
        False, description="moe.token_prior is where each token's own beta starts, a weight"
    )
    balance: Literal["loss", "bias", "quantile"] = Field(
        "loss",
        description=(
            "what keeps the load even (switch, locmoe, local_hash). loss: moe.balance_loss; bias: "
            "a bias for each expert, moved by moe.bias_rate after each step; quantile: a bias "
            "that evens the load of the step's own tokens while training"
        ),
    )
    bias_rate: Optional[float] = Field(
        None,
        gt=0,
        description="change of a bias in a step (balance: bias); null: 0.001, as DeepSeek-V3",
    )
    balance_loss: float = Field(
        0.01,
        ge=0,
        description=(
            "alpha, weight of the load-balance loss (balance: loss; switch, locmoe, locmoe_plus, "
            "local_hash)"
        ),
    )
    locality_loss: Optional[float] = Field(
        None,
        ge=0,
        description=(
            "mu, weight of the locality loss (locmoe, locmoe_plus, local_hash); null: 0.1, but 0 with "
            "data.sharding: iid, where it can only cost"
        ),
    )
    locality_smoothing: float = Field(
        0.1, gt=0, le=1, description="e in D_l = (1-e)*uniform(local experts) + e*uniform(all)"
    )
    z_loss: float = Field(
        0.0,
        ge=0,
        description=(
            "weight of the squared log-partition of the gate's logits (switch, locmoe, "
            "locmoe_plus, local_hash)"
        ),
    )
    jitter: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="gate input times uniform(1-jitter, 1+jitter) while training (switch)",
    )
    gate_scale: Optional[float] = Field(
        None,
        gt=0,
        description=(
            "scale of GrAP logits (locmoe, locmoe_plus, local_hash); null: "
            "sqrt(hidden_size/num_experts)"
        ),
    )
    cut_from: Optional[CutFromConfig] = Field(
        None, description="set in extracted sub-models: the model whose gate they keep"
    )
    token_choice: Optional[TokenChoiceConfig] = Field(
        None, description="how many experts a token may have (locmoe_plus); null: the defaults"
    )
    capacity: CapacityConfig = Field(default_factory=CapacityConfig)


class ParallelConfig(Section):
    expert_parallel: int = Field(1, ge=1, description="ranks that share the experts of one layer")
    tensor_parallel: int = Field(1, ge=1, description="ranks that share one layer's matrices")
    sequence_parallel: bool = Field(
        False,
        description=(
            "ranks that share matrices divide the tokens between them outside of the matrices"
        ),
    )
    shard_optimizer: bool = Field(
        False,
        description=(
            "ranks that hold the same weights divide Adam's moments and the update of them "
            "(ZeRO stage 1)"
        ),
    )
    nodes: int = Field(
        1,
        ge=1,
        description=(
            "N: a job of R processes has R / N ranks in each; one process emulates N, to which "
            "it assigns its sequences and experts"
        ),
    )
    exchange: Literal["flat", "hierarchical", "groupwise"] = Field(
        "flat", description="how tokens travel to their experts"
    )
    reduction: Optional[Literal["flat", "hierarchical"]] = Field(
        None,
        description=(
            "how gradients are added up over ranks: flat: each for itself, over all at once; "
            "hierarchical: in buckets, inside each node first, then between nodes; null: "
            "hierarchical where several nodes have several ranks each"
        ),
    )
    sizes: Literal["counts", "static"] = Field(
        "counts",
        description=(
            "counts: exactly the routed tokens travel; static: a fixed number of slots, "
            "moe.capacity.local_factor and remote_factor, so that a step compiles as one graph "
            "(Ascend)"
        ),
    )
    overlap_chunks: int = Field(
        1, ge=1, description="chunks of the exchange that run under computation"
    )


class SourceConfig(Section):
    path: str = Field(
        description=(
            "a file, a folder or a glob, relative to the working directory; .txt, .jsonl, "
            "code, any of them .gz; .parquet; Megatron's .bin and .idx"
        )
    )
    text_column: str = Field(
        "text", min_length=1, description="where JSON lines and Parquet have a document's text"
    )
    domain_column: str = Field(
        "domain",
        min_length=1,
        description="where they may have its domain, which then wins over the source's",
    )
    domain: str = Field(
        min_length=1,
        max_length=64,
        description="the domain of its documents: zh, en, bilingual, code, or a name of your own",
    )

    @field_validator("domain")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if value == "all":
            raise ValueError("another name: `all` stands for all domains together")
        if not value.isprintable() or value != value.strip():
            raise ValueError("printable characters without space at its ends")
        return value


class DataConfig(Section):
    sources: List[SourceConfig] = Field(default_factory=list, description="where the text is")
    prepared_dir: str = Field(
        "data/prepared",
        description=(
            "where tokenizers and MindRecord shards are kept, one folder per distinct preparation"
        ),
    )
    workers: Optional[int] = Field(
        None,
        ge=1,
        description="processes that tokenize; null: one for each core; the result is the same",
    )
    tokenizer: Optional[str] = Field(
        None, description="a tokenizer.json to load; null: train one on the training text"
    )
    mixture: Optional[Dict[str, float]] = Field(
        None, description="part of each domain in a batch; null: in proportion to its sequences"
    )
    validation_fraction: float = Field(
        0.05, gt=0, lt=1, description="fraction of the documents held out"
    )
    max_document_bytes: int = Field(
        1_000_000,
        ge=64,
        description=(
            "longer documents are cut into pieces of this size, longer undivided files than "
            "100 times this are left out"
        ),
    )
    max_bytes_per_domain: Optional[int] = Field(
        None, ge=1024, description="stop reading a domain after this much text; null: read all"
    )
    reset_at_document_end: bool = Field(
        True, description="attention and positions start anew at each document"
    )
    sharding: Literal["iid", "domain", "content"] = Field(
        "iid",
        description=(
            "which node reads what: anything; mostly the domains whose experts it holds; or "
            "sequences of alike content"
        ),
    )

    @field_validator("sharding", mode="before")
    @classmethod
    def _content_was_cluster(cls, value: Any) -> Any:
        """The name before, in users' files and in those of runs."""
        return "content" if value == "cluster" else value


class TrainConfig(Section):
    steps: int = Field(1000, ge=1, description="optimizer steps")
    batch_size: int = Field(
        8,
        ge=1,
        description="sequences in one optimizer step, over all ranks and accumulation steps",
    )
    accumulation_steps: int = Field(
        1, ge=1, description="micro-batches that make one optimizer step"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    final_learning_rate: float = Field(
        0.1, ge=0, le=1, description="where the decay ends, as a fraction of the peak"
    )
    warmup_steps: int = Field(50, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "polynomial", "constant"] = Field(
        "cosine", description="decay after the warm-up"
    )
    polynomial_power: float = Field(1.0, gt=0, description="power of the polynomial decay")
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled; not on norms, biases and embeddings"
    )
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0, description="Adam's epsilon")
    clip_norm: float = Field(1.0, gt=0, description="largest global norm of the gradient")
    mode: Literal["graph", "pynative"] = Field(
        "graph",
        description="graph: the whole step compiled; pynative: operator by operator, for debugging",
    )
    precision: Literal["fp32", "fp16", "bf16"] = Field(
        "fp32",
        description=(
            "of activations and matrix products; weights, norms, softmax and routing stay fp32"
        ),
    )
    loss_scale: float = Field(
        65536.0,
        gt=0,
        description=(
            "fp16: initial loss scale; halved on overflow, doubled after loss_scale_window "
            "good steps"
        ),
    )
    loss_scale_window: int = Field(
        1000, ge=1, description="fp16: good steps before the loss scale doubles"
    )
    recompute: bool = Field(
        False, description="recompute activations of decoder blocks in the backward pass"
    )
    offload_expert_optimizer: bool = Field(
        False,
        description=(
            "Adam's moments of the experts stay on the host, which computes the experts' "
            "update (PanGu-Sigma's ECSS in part)"
        ),
    )
    fused: bool = Field(
        False,
        description=(
            "Ascend's fused operators: flash attention, and with parallel.sizes: counts "
            "grouped products and token permutation"
        ),
    )
    seed: int = Field(
        1, ge=0, le=MAX_SEED, description="of weights, data order, hash tables and dropout"
    )
    log_every: int = Field(1, ge=1, description="steps between training rows in metrics.jsonl")

    @property
    def has_buffers(self) -> bool:
        """Whether a compiled step has several parts, with gradients added up in buffers between
        them.
        """
        return self.precision == "fp16" or self.accumulation_steps > 1


class EvaluationConfig(Section):
    every: int = Field(100, ge=1, description="steps between evaluations; always at the last step")
    sequences: int = Field(
        64,
        ge=1,
        description=(
            "validation sequences per domain at each evaluation, spread evenly over its text"
        ),
    )
    batch_size: Optional[int] = Field(
        None,
        ge=1,
        description="sequences at a time; null: train.batch_size / train.accumulation_steps",
    )


class TraceConfig(Section):
    every: int = Field(1, ge=1, description="steps between rows of load.npz")
    max_rows: Optional[int] = Field(
        None, ge=1, description="stop tracing after this many rows; null: never"
    )
    timeline: Optional[int] = Field(
        None,
        ge=1,
        description=(
            "the step of a job whose exchanges and expert computations are written, with their "
            "times, to timeline.json, a Chrome trace; null: none"
        ),
    )
    profile: Optional[int] = Field(
        None,
        ge=1,
        description=(
            "the step that runs under MindSpore's profiler, which writes its operators to the run "
            "directory's profile/; null: none"
        ),
    )


class PlacementConfig(Section):
    start: Union[str, List[List[int]], None] = Field(
        None,
        description=(
            "where experts are at first: for each sparse layer the expert of every slot, or "
            "the file of a plan of `load place`, in any of its formats; null: in order"
        ),
    )
    policy: Literal["off", "locality", "eplb"] = Field(
        "off",
        description=(
            "whether experts change ranks while training, and by what: modelled step time, or "
            "balance alone"
        ),
    )
    every: int = Field(
        200,
        ge=1,
        description=(
            "steps between plans; each is made from the forecast of the load up to the next one"
        ),
    )
    min_gain: float = Field(
        0.05,
        ge=0,
        lt=1,
        description=(
            "accept a plan only if it shortens the modelled step, moving included, by this fraction"
        ),
    )
    while_transient: bool = Field(
        False,
        description=(
            "also move experts of layers whose load is not yet stable, for which a forecast is "
            "worth little"
        ),
    )
    flops_per_second: float = Field(1e14, gt=0, description="what one rank sustains on its experts")
    link_bytes_per_second: float = Field(
        1.25e10, gt=0, description="of one node's link, each direction"
    )

    @field_validator("policy", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        """YAML reads a bare off as false."""
        return "off" if value is False else value


class WandbConfig(Section):
    project: str = Field("pangu_locmoe", min_length=1, description="where the run is shown")
    entity: Optional[str] = Field(
        None, min_length=1, description="user or team; null: that of the login"
    )
    name: Optional[str] = Field(
        None, min_length=1, description="of the run; null: that of the run directory"
    )
    mode: Literal["online", "offline"] = Field(
        "online",
        description="offline: into the run directory, for `wandb sync`; no network, no login",
    )


class SwanlabConfig(Section):
    project: str = Field("pangu_locmoe", min_length=1, description="where the run is shown")
    workspace: Optional[str] = Field(
        None, min_length=1, description="user or organisation; null: that of the login"
    )
    name: Optional[str] = Field(
        None, min_length=1, description="of the run; null: that of the run directory"
    )
    mode: Literal["online", "offline"] = Field(
        "online",
        description="offline: into the run directory, for `swanlab sync`; no network, no login",
    )


class LoggingConfig(Section):
    wandb: Optional[WandbConfig] = Field(
        None, description="log to Weights & Biases, `{}` with the defaults (extra wandb); null: no"
    )
    swanlab: Optional[SwanlabConfig] = Field(
        None, description="log to SwanLab, `{}` with the defaults (extra swanlab); null: no"
    )


class CheckpointConfig(Section):
    every: int = Field(200, ge=1, description="steps between checkpoints; always at the last step")
    keep: int = Field(
        2,
        ge=1,
        description="how many of the latest to keep, besides the best; a new best is always saved",
    )


class SampleConfig(Section):
    tokens: int = Field(
        64, ge=0, description="tokens of the sample printed for each domain after training; 0: none"
    )
    temperature: float = Field(0.8, ge=0, description="0: always the likeliest token")
    top_k: int = Field(40, ge=0, description="0: no limit")
    top_p: float = Field(0.95, gt=0, le=1)


class Config(Section):
    """A whole run. `load_config` reads it; frozen, so that what is logged is what was used."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    moe: MoEConfig = Field(default_factory=MoEConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    trace: TraceConfig = Field(default_factory=TraceConfig)
    placement: PlacementConfig = Field(default_factory=PlacementConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    sample: SampleConfig = Field(default_factory=SampleConfig)

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain names in the order of their first source; domain ids everywhere index this
        tuple.
        """
        return tuple(dict.fromkeys(source.domain for source in self.data.sources))

    @property
    def locality_weight(self) -> float:
        """mu, the weight of the locality loss, its default resolved: with identically
        distributed nodes it can only cost.
        """
        if self.moe.locality_loss is not None:
            return self.moe.locality_loss
        return 0.1 if self.data.sharding != "iid" else 0.0

    @property
    def node_groups(self) -> int:
        """G, groups of consecutive experts, one for each node that the model is made for."""
        return self.moe.node_groups or self.parallel.nodes

    @property
    def micro_batch(self) -> int:
        """Sequences in one forward pass."""
        return self.train.batch_size // self.train.accumulation_steps

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
