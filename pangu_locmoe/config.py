"""The YAML as typed models: every key, its default and its meaning on one line.

A file may name another one with `base: PATH` (relative to itself); its own keys win. `--set a.b=c` wins over
both. Anything that is not known, not of the right type or not possible stops here with a ConfigError.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, Type, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pangu_locmoe.errors import ConfigError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class ModelConfig(Section):
    vocab_size: int = Field(8192, ge=257, description="tokens in the vocabulary; 256 bytes and the end-of-document token at least")
    hidden_size: int = Field(256, ge=1, description="D, width of the residual stream")
    num_layers: int = Field(5, ge=2, description="all layers, the query layer included")
    num_moe_layers: int = Field(2, ge=0, description="the top decoder blocks below the query layer that are sparse")
    num_heads: int = Field(4, ge=1, description="H, attention heads")
    ffn_size: int = Field(1024, ge=1, description="F, inner width of a feed-forward network and of an expert")
    seq_length: int = Field(256, ge=2, description="S, tokens in a sequence")
    dropout: float = Field(0.0, ge=0, lt=1, description="on embeddings, attention output and feed-forward output")
    domain_embeddings: bool = Field(False, description="one word-embedding slot per domain instead of a shared one")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial weights; residual outputs get it divided by sqrt(2*num_layers)")


class CapacityConfig(Section):
    policy: Literal["factor", "bound", "dropless"] = Field("factor", description="factor: ceil(factor*tokens/experts); bound: LocMoE's lower bound, measured after warm-up; dropless: never drop")
    factor: float = Field(1.25, ge=1.0, description="capacity factor c_f; for `bound`, the upper clamp")
    statistic: Union[Literal["min", "median", "mean", "max"], float] = Field("median", description="bound: which statistic (or quantile in [0, 1]) of the cosines between tokens and their gate is delta")
    warmup_steps: int = Field(100, ge=1, description="bound: steps before delta is measured; routing swings wildly in the first 50")
    drop_order: Literal["affinity", "position"] = Field("affinity", description="which tokens lose when an expert is full: the lowest affinity, or the last position")
    local_factor: Optional[float] = Field(None, gt=0, description="capacity factor for sources in the expert's node (static exchange)")
    remote_factor: Optional[float] = Field(None, gt=0, description="capacity factor for sources in other nodes (static exchange)")


class CutFromConfig(Section):
    num_experts: int = Field(ge=1, description="experts of each sparse layer of the whole model")
    first_expert: int = Field(ge=0, description="where the sub-model's experts begin in it")


class MoEConfig(Section):
    router: str = Field("locmoe", description="hash | switch | locmoe, or the name of a registered router")
    num_experts: int = Field(8, ge=1, description="E, experts in each sparse layer")
    levels: int = Field(2, ge=1, le=2, description="2: a token may only go to its domain's expert group; 1: one group of all experts")
    group_sizes: Optional[Dict[str, int]] = Field(None, description="experts of each domain's group (levels: 2); null: equal shares")
    balance_loss: float = Field(0.01, ge=0, description="alpha, weight of the load-balance loss (switch, locmoe)")
    locality_loss: float = Field(0.1, ge=0, description="mu, weight of the locality loss (locmoe)")
    locality_smoothing: float = Field(0.1, gt=0, le=1, description="e in D_l = (1-e)*uniform(local experts) + e*uniform(all)")
    z_loss: float = Field(0.0, ge=0, description="weight of the squared log-partition of the gate's logits (switch, locmoe)")
    jitter: float = Field(0.0, ge=0, lt=1, description="gate input times uniform(1-jitter, 1+jitter) while training (switch)")
    gate_scale: Optional[float] = Field(None, gt=0, description="scale of GrAP logits (locmoe); null: sqrt(hidden_size/num_experts)")
    cut_from: Optional[CutFromConfig] = Field(None, description="set in extracted sub-models: the model whose gate they keep")
    capacity: CapacityConfig = Field(default_factory=CapacityConfig)


class ParallelConfig(Section):
    expert_parallel: int = Field(1, ge=1, description="ranks that share the experts of one layer")
    tensor_parallel: int = Field(1, ge=1, description="ranks that share one layer's matrices")
    ranks_per_node: Optional[int] = Field(None, ge=1, description="ranks in one node")
    emulated_nodes: int = Field(1, ge=1, description="N, nodes to which one process assigns its sequences and experts, so that locality can be trained and measured")
    exchange: Literal["flat", "hierarchical", "groupwise"] = Field("flat", description="how tokens travel to their experts")
    overlap_chunks: int = Field(1, ge=1, description="chunks of the exchange that run under computation")


class SourceConfig(Section):
    path: str = Field(description="a file, a folder or a glob, relative to the working directory; .txt, .jsonl, code, any of them .gz")
    domain: str = Field(min_length=1, description="the domain of its documents: zh, en, bilingual, code, or a name of your own")


class DataConfig(Section):
    sources: List[SourceConfig] = Field(default_factory=list, description="where the text is")
    prepared_dir: str = Field("data/prepared", description="where tokenizers and MindRecord shards are kept, one folder per distinct preparation")
    tokenizer: Optional[str] = Field(None, description="a tokenizer.json to load; null: train one on the training text")
    mixture: Optional[Dict[str, float]] = Field(None, description="share of each domain in a batch; null: in proportion to its sequences")
    validation_fraction: float = Field(0.05, gt=0, lt=1, description="share of the documents held out")
    max_document_bytes: int = Field(1_000_000, ge=64, description="longer documents are cut into pieces of this size, longer undivided files than 100 times this are left out")
    max_bytes_per_domain: Optional[int] = Field(None, ge=1024, description="stop reading a domain after this much text; null: read all")
    reset_at_document_end: bool = Field(True, description="attention and positions start anew at each document")
    sharding: Literal["iid", "domain", "cluster"] = Field("iid", description="which node reads what: anything, or mostly the domains whose experts it holds")


class TrainConfig(Section):
    steps: int = Field(1000, ge=1, description="optimizer steps")
    batch_size: int = Field(8, ge=1, description="sequences in one optimizer step, over all ranks and accumulation steps")
    accumulation_steps: int = Field(1, ge=1, description="micro-batches that make one optimizer step")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    final_learning_rate: float = Field(0.1, ge=0, le=1, description="where the decay ends, as a share of the peak")
    warmup_steps: int = Field(50, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "polynomial", "constant"] = Field("cosine", description="decay after the warm-up")
    polynomial_power: float = Field(1.0, gt=0, description="power of the polynomial decay")
    weight_decay: float = Field(0.1, ge=0, description="decoupled; not on norms, biases and embeddings")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0, description="Adam's epsilon")
    clip_norm: float = Field(1.0, gt=0, description="largest global norm of the gradient")
    mode: Literal["graph", "pynative"] = Field("graph", description="graph: the whole step compiled; pynative: operator by operator, for debugging")
    precision: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="of activations and matrix products; weights, norms, softmax and routing stay fp32")
    loss_scale: float = Field(65536.0, gt=0, description="fp16: initial loss scale; halved on overflow, doubled after loss_scale_window good steps")
    loss_scale_window: int = Field(1000, ge=1, description="fp16: good steps before the loss scale doubles")
    recompute: bool = Field(False, description="recompute activations of decoder blocks in the backward pass")
    seed: int = Field(1, ge=0, description="of weights, data order, hash tables and dropout")
    log_every: int = Field(1, ge=1, description="steps between training rows in metrics.jsonl")


class EvaluationConfig(Section):
    every: int = Field(100, ge=1, description="steps between evaluations; always at the last step")
    sequences: int = Field(64, ge=1, description="validation sequences per domain at each evaluation")
    batch_size: Optional[int] = Field(None, ge=1, description="sequences at a time; null: train.batch_size / train.accumulation_steps")


class TraceConfig(Section):
    every: int = Field(1, ge=1, description="steps between rows of load.npz")
    max_rows: Optional[int] = Field(None, ge=1, description="stop tracing after this many rows; null: never")


class CheckpointConfig(Section):
    every: int = Field(200, ge=1, description="steps between checkpoints; always at the last step")
    keep: int = Field(2, ge=1, description="how many of the latest to keep, besides the best")


class SampleConfig(Section):
    tokens: int = Field(64, ge=0, description="tokens of the sample printed for each domain after training; 0: none")
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
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    sample: SampleConfig = Field(default_factory=SampleConfig)

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain names in the order of their first source; domain ids everywhere index this tuple."""
        return tuple(dict.fromkeys(source.domain for source in self.data.sources))

    @property
    def micro_batch(self) -> int:
        """Sequences in one forward pass."""
        return self.train.batch_size // self.train.accumulation_steps

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where PyYAML drops the first, and reads 1e-3 as a number, not as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.value[index][0].start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789"))


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, its bases and `key=value` overrides. Raises ConfigError naming key, value and what is allowed."""
    values = _read(Path(path), ())
    for override in overrides or []:
        _override(values, override)
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> Config:
    """Validate plain nested values. Raises ConfigError with one line per problem."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error.errors()))) from None
    problems = [f"{key} = {_lookup(config, key)!r}: {rule}" for key, rule in _broken_rules(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def json_schema() -> str:
    """The JSON schema of a configuration file, for editors."""
    schema = Config.model_json_schema()
    schema["properties"]["base"] = {"type": "string", "description": "another file whose values this one starts from"}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"base = {str(path)!r}: the file is its own base")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold sections such as `model:` and `moe:`, holds a {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"base = {base!r}: must be the path of another configuration file")
    return _merge(_read(path.parent / base, (*seen, path.resolve())), values)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        # Tables whose keys are domain names are replaced as a whole: a half of a mixture has no meaning.
        merged[key] = _merge(merged[key], value) if both and key not in ("mixture", "group_sizes") else value
    return merged


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: must be KEY=VALUE, for example moe.router=switch")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override!r}: the value is not YAML") from None
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a section")
        values = child
    values[last] = value


def _explain(items: Sequence[Any]) -> Iterator[str]:
    """One line for each key: its value, what is allowed, the nearest valid key."""
    by_key: Dict[str, List[Any]] = {}
    for item in items:
        by_key.setdefault(".".join(map(str, _key(item["loc"]))), []).append(item)
    for key, group in by_key.items():
        first = group[0]
        if first["type"] == "extra_forbidden":
            yield f"{key} = {first['input']!r}: unknown key; {_hint(first['loc'])}"
        elif first["type"] == "missing":
            yield f"{key}: required, but not given"
        elif first["type"] == "invalid_key":
            yield f"{key}: a key must be text, not the {type(first['input']).__name__} {first['input']!r}"
        else:
            yield f"{key} = {first['input']!r}: must be {', or '.join(_allowed(item) for item in group)}"


def _key(location: tuple[Any, ...]) -> tuple[Any, ...]:
    """The place without what pydantic appends: the member of a Union it tried, or a note that a table's key is wrong."""
    annotation = _annotation(location[:-1])
    is_union = get_origin(annotation) is Union and type(None) not in get_args(annotation)
    return location[:-1] if is_union or location[-1] == "[key]" else location


def _allowed(item: Any) -> str:
    if item["type"] in ("model_type", "dict_type"):
        return "a section of `key: value` lines"
    if item["type"] == "string_too_short":
        return f"text of at least {item['ctx']['min_length']} character"
    message = str(item["msg"]).removeprefix("Input should be ")
    return message.replace("a valid string", "text").replace("a valid integer", "an integer").replace("a valid ", "a ")


def _hint(location: tuple[Any, ...]) -> str:
    """The nearest valid key: in the same section, else a key of that name elsewhere, else all keys of the section."""
    *section, name = map(str, location)
    known = list(_annotation(location[:-1]).model_fields)
    elsewhere = [key for key in _all_keys() if key.rpartition(".")[2] == name]
    nested = [key for key in _all_keys() if "." in key]
    nearest = difflib.get_close_matches(name, known, n=1) or elsewhere or difflib.get_close_matches(name, known + nested, n=1, cutoff=0.5)
    if not nearest:
        return f"known here: {', '.join(known)}"
    return f"did you mean {'.'.join([*section, nearest[0]]) if nearest[0] in known else nearest[0]}?"


def _annotation(location: tuple[Any, ...]) -> Any:
    """The type at a place: a section's class, or the annotation of a value or a table."""
    annotation: Any = Config
    for part in location:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and part in annotation.model_fields:
            annotation = annotation.model_fields[part].annotation
        elif get_origin(annotation) is list:
            annotation = get_args(annotation)[0]
        else:
            return None
    return annotation


def _all_keys(model: Type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")


def _lookup(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _broken_rules(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (key, rule) for every combination that cannot work."""
    yield from _broken_model_rules(config)
    yield from _broken_moe_rules(config)
    yield from _broken_parallel_rules(config)
    yield from _broken_data_rules(config)
    yield from _broken_train_rules(config)


def _broken_model_rules(config: Config) -> Iterator[tuple[str, str]]:
    model = config.model
    if model.hidden_size % model.num_heads:
        yield "model.hidden_size", f"must be divisible by model.num_heads ({model.num_heads})"
    if model.num_moe_layers > model.num_layers - 1:
        yield "model.num_moe_layers", f"must be at most model.num_layers - 1 ({model.num_layers - 1}): the query layer is dense"


def _broken_moe_rules(config: Config) -> Iterator[tuple[str, str]]:
    # Imported here because routers are registered where their code is, and that imports MindSpore.
    from pangu_locmoe.moe.routers import ROUTERS

    model, moe, domains = config.model, config.moe, config.domains
    if moe.router in ROUTERS:
        yield from ROUTERS[moe.router].broken_rules(config)
    else:
        nearest = difflib.get_close_matches(moe.router, ROUTERS, n=1)
        yield "moe.router", f"must be one of {', '.join(ROUTERS)}" + (f"; did you mean {nearest[0]}?" if nearest else "")
    statistic = moe.capacity.statistic
    if isinstance(statistic, float) and not 0 <= statistic <= 1:
        yield "moe.capacity.statistic", "must be min, median, mean, max or a quantile between 0 and 1"
    for key in ("local_factor", "remote_factor"):
        if getattr(moe.capacity, key) is not None:
            yield f"moe.capacity.{key}", "needs expert parallelism with static sizes, which this version does not have; leave it out"
    if moe.cut_from is not None and moe.cut_from.first_expert + moe.num_experts > moe.cut_from.num_experts:
        yield "moe.cut_from", f"must have room for moe.num_experts ({moe.num_experts}) from its first_expert on"
    if moe.levels == 1 and moe.group_sizes is not None:
        yield "moe.group_sizes", "needs moe.levels: 2"
    if moe.levels == 2 and domains and model.num_moe_layers:
        if moe.group_sizes is None:
            if moe.num_experts % len(domains):
                yield "moe.num_experts", f"must be divisible by the number of domains ({len(domains)}) for equal groups; or give moe.group_sizes"
        else:
            if sorted(moe.group_sizes) != sorted(domains):
                yield "moe.group_sizes", f"must have exactly the domains of data.sources ({', '.join(domains)})"
            if min(moe.group_sizes.values(), default=0) < 1:
                yield "moe.group_sizes", "every group needs at least 1 expert"
            if sum(moe.group_sizes.values()) != moe.num_experts:
                yield "moe.group_sizes", f"must add up to moe.num_experts ({moe.num_experts})"


def _broken_parallel_rules(config: Config) -> Iterator[tuple[str, str]]:
    parallel = config.parallel
    if parallel.tensor_parallel > 1:
        yield "parallel.tensor_parallel", "this version does not split matrices over ranks: must be 1"
    if parallel.overlap_chunks > 1:
        yield "parallel.overlap_chunks", "this version does not overlap the exchange with computation: must be 1"
    if parallel.exchange == "groupwise":
        yield "parallel.exchange", "groupwise needs tensor parallelism, which this version does not have: must be flat or hierarchical"
    if parallel.exchange == "hierarchical" and parallel.ranks_per_node is None:
        yield "parallel.exchange", "hierarchical needs parallel.ranks_per_node, which is never guessed"
    if config.model.num_moe_layers and config.moe.num_experts % parallel.expert_parallel:
        yield "parallel.expert_parallel", f"must divide moe.num_experts ({config.moe.num_experts}): every rank holds as many experts"
    if parallel.expert_parallel > 1 and config.train.recompute:
        yield "train.recompute", "would repeat the exchange between processes: must be false with parallel.expert_parallel > 1"
    nodes = parallel.emulated_nodes
    if config.micro_batch % nodes:
        yield "parallel.emulated_nodes", f"must divide train.batch_size / train.accumulation_steps ({config.micro_batch}): every node reads as many sequences"
    if config.moe.num_experts % nodes:
        yield "parallel.emulated_nodes", f"must divide moe.num_experts ({config.moe.num_experts}): every node holds as many experts"


def _broken_data_rules(config: Config) -> Iterator[tuple[str, str]]:
    data, domains = config.data, config.domains
    if data.mixture is not None:
        if sorted(data.mixture) != sorted(domains):
            yield "data.mixture", f"must have exactly the domains of data.sources ({', '.join(domains)})"
        elif min(data.mixture.values(), default=0) < 0 or sum(data.mixture.values()) <= 0:
            yield "data.mixture", "shares must be at least 0 and one of them above 0"
    if data.sharding == "cluster":
        yield "data.sharding", "this version has iid and domain"
    if data.sharding == "domain" and config.parallel.emulated_nodes == 1 and config.parallel.ranks_per_node is None:
        yield "data.sharding", "domain sharding needs more than one node (parallel.emulated_nodes, or parallel.ranks_per_node in a job)"


def _broken_train_rules(config: Config) -> Iterator[tuple[str, str]]:
    train = config.train
    if train.batch_size % train.accumulation_steps:
        yield "train.batch_size", f"must be divisible by train.accumulation_steps ({train.accumulation_steps})"
    if train.warmup_steps >= train.steps and train.warmup_steps:
        yield "train.warmup_steps", f"must be less than train.steps ({train.steps})"
