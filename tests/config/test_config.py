"""The configuration: what is read, what is refused, and whether the refusal helps."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pangu_locmoe.config import Config, doubtful_settings, json_schema, load_config, parse_config
from pangu_locmoe.config.stored import load_stored_config
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.moe.routers import router_class

CONFIG_FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(CONFIG_FOLDER.rglob("*.yaml"))
TWO_DOMAINS = {"sources": [{"path": "a", "domain": "en"}, {"path": "b", "domain": "zh"}]}

# (values, what the message must hold: the key with its value, then the rule or the nearest key)
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    # unknown keys
    "misspelt section": ({"trian": {}}, ["trian = {}", "did you mean train?"]),
    "misspelt key": (
        {"model": {"hiden_size": 64}},
        ["model.hiden_size = 64", "did you mean model.hidden_size?"],
    ),
    "misspelt subsection": (
        {"moe": {"capcity": {"factor": 2.0}}},
        ["moe.capcity = {'factor': 2.0}", "did you mean moe.capacity?"],
    ),
    "misspelt nested key": (
        {"moe": {"capacity": {"plicy": "bound"}}},
        ["moe.capacity.plicy = 'bound'", "did you mean moe.capacity.policy?"],
    ),
    "key at top level": ({"router": "hash"}, ["router = 'hash'", "did you mean moe.router?"]),
    "section at top level": (
        {"capacity": {"factor": 2.0}},
        ["capacity = {'factor': 2.0}", "did you mean moe.capacity?"],
    ),
    "key in another section": (
        {"model": {"seed": 3}},
        ["model.seed = 3", "did you mean train.seed?"],
    ),
    "key one level too high": (
        {"moe": {"factor": 2.0}},
        ["moe.factor = 2.0", "did you mean moe.capacity.factor?"],
    ),
    "nothing near": ({"zzz": 1}, ["zzz = 1", "known here: model, moe, parallel, data, train"]),
    "misspelt key of a list item": (
        {"data": {"sources": [{"path": "a", "domian": "en"}]}},
        ["data.sources.0.domian = 'en'", "did you mean data.sources.0.domain?"],
    ),
    "key that is no text": (
        {"moe": {8: "experts"}},
        ["moe.8", "a key must be text, not the int 8"],
    ),
    # types
    "text for an integer": (
        {"model": {"hidden_size": "8"}},
        ["model.hidden_size = '8'", "must be an integer"],
    ),
    "float for an integer": (
        {"moe": {"num_experts": 8.0}},
        ["moe.num_experts = 8.0", "must be an integer"],
    ),
    "boolean for an integer": (
        {"moe": {"levels": True}},
        ["moe.levels = True", "must be an integer"],
    ),
    "text for a number": (
        {"train": {"learning_rate": "fast"}},
        ["train.learning_rate = 'fast'", "must be a number"],
    ),
    "text for a boolean": (
        {"train": {"recompute": "yes"}},
        ["train.recompute = 'yes'", "must be a boolean"],
    ),
    "number for a text": ({"moe": {"router": 1}}, ["moe.router = 1", "must be text"]),
    "value for a section": ({"model": 3}, ["model = 3", "must be a section"]),
    "empty section": ({"model": None}, ["model = None", "must be a section"]),
    "path for a source": (
        {"data": {"sources": ["corpus/en"]}},
        ["data.sources.0 = 'corpus/en'", "must be a section"],
    ),
    "one source without a list": (
        {"data": {"sources": {"path": "a", "domain": "en"}}},
        ["data.sources = {'path': 'a'", "must be a list"],
    ),
    "text in a table": (
        {"data": {"mixture": {"en": "half"}}},
        ["data.mixture.en = 'half'", "must be a number"],
    ),
    "source without a domain": (
        {"data": {"sources": [{"path": "a"}]}},
        ["data.sources.0.domain", "required"],
    ),
    "neither word nor number": (
        {"moe": {"capacity": {"statistic": "medain"}}},
        ["moe.capacity.statistic = 'medain'", "'min', 'median', 'mean' or 'max', or a number"],
    ),
    # ranges
    "too small": (
        {"model": {"vocab_size": 256}},
        ["model.vocab_size = 256", "greater than or equal to 257"],
    ),
    "too large": ({"model": {"dropout": 1.0}}, ["model.dropout = 1.0", "less than 1"]),
    "not a number": (
        {"train": {"learning_rate": float("nan")}},
        ["train.learning_rate = nan", "finite"],
    ),
    "infinite": ({"train": {"epsilon": float("inf")}}, ["train.epsilon = inf", "finite"]),
    "no such choice": (
        {"train": {"precision": "fp8"}},
        ["train.precision = 'fp8'", "'fp32', 'fp16' or 'bf16'"],
    ),
    "three levels": ({"moe": {"levels": 3}}, ["moe.levels = 3", "less than or equal to 2"]),
    "nameless domain": (
        {"data": {"sources": [{"path": "a", "domain": ""}]}},
        ["data.sources.0.domain = ''", "at least 1 character"],
    ),
    "domain of all": (
        {"data": {"sources": [{"path": "a", "domain": "all"}]}},
        ["data.sources.0.domain = 'all'", "must be another name: `all` stands for all domains"],
    ),
    "domain of two lines": (
        {"data": {"sources": [{"path": "a", "domain": "e\nn"}]}},
        ["data.sources.0.domain = 'e\\nn'", "must be printable characters"],
    ),
    "domain with space": (
        {"data": {"sources": [{"path": "a", "domain": "en "}]}},
        ["data.sources.0.domain = 'en '", "without space at its ends"],
    ),
    "domain without end": (
        {"data": {"sources": [{"path": "a", "domain": "e" * 65}]}},
        ["data.sources.0.domain = 'eee", "text of at most 64 characters"],
    ),
    "seed of 64 bits": (
        {"train": {"seed": 2**63}},
        [f"train.seed = {2**63}", f"less than or equal to {2**63 - 1}"],
    ),
    "negative seed": ({"train": {"seed": -1}}, ["train.seed = -1", "greater than or equal to 0"]),
    "factor of nothing": (
        {"moe": {"capacity": {"factor": 0.0}}},
        ["moe.capacity.factor = 0.0", "greater than 0"],
    ),
    "quantile above one": (
        {"moe": {"capacity": {"statistic": 1.5}}},
        ["moe.capacity.statistic = 1.5", "a quantile between 0 and 1"],
    ),
    # combinations
    "heads": (
        {"model": {"hidden_size": 100, "num_heads": 3}, "moe": {"router": "hash"}},
        ["model.hidden_size = 100", "divisible by model.num_heads (3)"],
    ),
    "too many sparse layers": (
        {"model": {"num_layers": 4, "num_moe_layers": 4}},
        ["model.num_moe_layers = 4", "at most model.num_layers - 1 (3)"],
    ),
    "no such router": (
        {"moe": {"router": "Switch"}},
        ["moe.router = 'Switch'", "hash, locmoe, locmoe_plus, switch", "did you mean switch?"],
    ),
    "pooling blocks": (
        {"moe": {"num_experts": 6}},
        ["model.hidden_size = 256", "divisible by moe.num_experts (6)"],
    ),
    "bound without a gate": (
        {"moe": {"router": "hash", "capacity": {"policy": "bound"}}},
        ["moe.capacity.policy = 'bound'", "needs a router with a gate"],
    ),
    "static capacity without static sizes": (
        {"moe": {"capacity": {"local_factor": 1.0}}},
        ["moe.capacity.local_factor = 1.0", "needs parallel.sizes: static"],
    ),
    "static sizes without a local factor": (
        {
            "parallel": {"sizes": "static", "expert_parallel": 2},
            "moe": {"capacity": {"remote_factor": 1.0}},
        },
        ["moe.capacity.local_factor = None", "static needs a number"],
    ),
    "static sizes without a remote factor": (
        {
            "parallel": {"sizes": "static", "expert_parallel": 2},
            "moe": {"capacity": {"local_factor": 1.0}},
        },
        ["moe.capacity.remote_factor = None", "static needs a number"],
    ),
    "static sizes in one process": (
        {
            "parallel": {"sizes": "static"},
            "moe": {"capacity": {"local_factor": 1.0, "remote_factor": 1.0}},
        },
        ["parallel.sizes = 'static'", "needs parallel.expert_parallel > 1"],
    ),
    "static sizes, dropless": (
        {
            "parallel": {"sizes": "static", "expert_parallel": 2},
            "moe": {"capacity": {"policy": "dropless", "local_factor": 1.0, "remote_factor": 1.0}},
        },
        ["moe.capacity.policy = 'dropless'", "must be factor with parallel.sizes: static"],
    ),
    "static sizes by way of nodes": (
        {
            "parallel": {
                "sizes": "static",
                "expert_parallel": 2,
                "nodes": 2,
                "exchange": "hierarchical",
            },
            "moe": {"capacity": {"local_factor": 1.0, "remote_factor": 1.0}},
        },
        [
            "parallel.exchange = 'hierarchical'",
            "must be flat or groupwise with parallel.sizes: static",
        ],
    ),
    "groups on one level": (
        {"moe": {"levels": 1, "group_sizes": {"en": 8}}},
        ["moe.group_sizes = {'en': 8}", "needs moe.levels: 2"],
    ),
    "unequal groups": (
        {"moe": {"router": "hash", "num_experts": 7}, "data": TWO_DOMAINS},
        ["moe.num_experts = 7", "divisible by the number of domains (2)"],
    ),
    "groups of other domains": (
        {"moe": {"group_sizes": {"en": 8}}, "data": TWO_DOMAINS},
        ["moe.group_sizes = {'en': 8}", "exactly the domains of data.sources (en, zh)"],
    ),
    "empty group": (
        {"moe": {"group_sizes": {"en": 8, "zh": 0}}, "data": TWO_DOMAINS},
        ["moe.group_sizes = {'en': 8, 'zh': 0}", "at least 1 expert"],
    ),
    "groups that do not add up": (
        {"moe": {"group_sizes": {"en": 4, "zh": 2}}, "data": TWO_DOMAINS},
        ["moe.group_sizes = {'en': 4, 'zh': 2}", "add up to moe.num_experts (8)"],
    ),
    "ranks and experts": (
        {"parallel": {"expert_parallel": 3}},
        ["parallel.expert_parallel = 3", "divide moe.num_experts (8)"],
    ),
    "heads over ranks": (
        {"parallel": {"tensor_parallel": 3}, "model": {"ffn_size": 1023, "vocab_size": 300}},
        ["model.num_heads = 4", "divisible by parallel.tensor_parallel (3)"],
    ),
    "vocabulary over ranks": (
        {"parallel": {"tensor_parallel": 2}, "model": {"vocab_size": 8191}},
        ["model.vocab_size = 8191", "divisible by parallel.tensor_parallel (2)"],
    ),
    "rows, recomputed, in several graphs": (
        {
            "parallel": {
                "sequence_parallel": True,
                "tensor_parallel": 2,
                "expert_parallel": 2,
                "sizes": "static",
            },
            "moe": {"capacity": {"local_factor": 1.0, "remote_factor": 1.0}},
            "train": {"recompute": True, "precision": "fp16"},
        },
        ["train.recompute = True", "does not compile it with parallel.sequence_parallel"],
    ),
    "rows of a rank alone": (
        {"parallel": {"sequence_parallel": True}},
        ["parallel.sequence_parallel = True", "needs parallel.tensor_parallel > 1"],
    ),
    "rows that cannot be divided": (
        {
            "parallel": {"sequence_parallel": True, "tensor_parallel": 4},
            "model": {"seq_length": 255},
        },
        ["model.seq_length = 255", "divisible by parallel.tensor_parallel (4)"],
    ),
    "nothing to offload": (
        {"model": {"num_moe_layers": 0}, "train": {"offload_expert_optimizer": True}},
        ["train.offload_expert_optimizer = True", "needs sparse layers"],
    ),
    "overlap": (
        {"parallel": {"overlap_chunks": 2}},
        ["parallel.overlap_chunks = 2", "needs parallel.sizes: static"],
    ),
    "group-wise exchange": (
        {"parallel": {"exchange": "groupwise"}},
        ["parallel.exchange = 'groupwise'", "needs parallel.tensor_parallel > 1"],
    ),
    "overlap of slots that change": (
        {
            "parallel": {"overlap_chunks": 2, "sizes": "static", "expert_parallel": 2},
            "moe": {"capacity": {"local_factor": "auto", "remote_factor": 1.0}},
        },
        ["parallel.overlap_chunks = 2", "needs numbers for moe.capacity.local_factor"],
    ),
    "placement in one process": (
        {"placement": {"policy": "locality"}},
        ["placement.policy = 'locality'", "needs sparse layers and parallel.expert_parallel > 1"],
    ),
    "placement of static slots": (
        {
            "placement": {"policy": "eplb"},
            "parallel": {"sizes": "static", "expert_parallel": 2},
            "moe": {"capacity": {"local_factor": "auto", "remote_factor": 1.0}},
        },
        ["placement.policy = 'eplb'", "needs parallel.sizes: counts"],
    ),
    "placement without a whole trace": (
        {
            "placement": {"policy": "eplb"},
            "parallel": {"expert_parallel": 2},
            "trace": {"max_rows": 5},
        },
        ["trace.max_rows = 5", "must be null with a placement policy"],
    ),
    "placement without rows": (
        {
            "placement": {"policy": "eplb", "every": 15},
            "parallel": {"expert_parallel": 2},
            "trace": {"every": 10},
        },
        ["placement.every = 15", "at least twice trace.every (10)"],
    ),
    "a start in one process": (
        {"placement": {"start": "plan.json"}},
        ["placement.start = 'plan.json'", "needs sparse layers and parallel.expert_parallel > 1"],
    ),
    "a start of other layers": (
        {
            "placement": {"start": [[0, 1]]},
            "parallel": {"expert_parallel": 2},
            "moe": {"num_experts": 2},
        },
        ["placement.start = [[0, 1]]", "a list for each of the 2 sparse layers"],
    ),
    "a start without an expert": (
        {
            "placement": {"start": [[0, 1], [1, 1]]},
            "parallel": {"expert_parallel": 2},
            "moe": {"num_experts": 2},
        },
        ["placement.start = [[0, 1], [1, 1]]", "each expert from 0 to 1 once in every layer"],
    ),
    "a start that is a number": ({"placement": {"start": 3}}, ["placement.start"]),
    "exchange by nodes": (
        {"parallel": {"exchange": "hierarchical"}},
        ["parallel.exchange = 'hierarchical'", "needs more than one node (parallel.nodes)"],
    ),
    "recomputed routing": (
        {"parallel": {"expert_parallel": 2}, "train": {"recompute": True}},
        [
            "train.recompute = True",
            "needs parallel.sizes: static with parallel.expert_parallel > 1",
        ],
    ),
    "fused in fp32": (
        {"train": {"fused": True}},
        ["train.fused = True", "must be false with train.precision: fp32"],
    ),
    "fused with small heads": (
        {"model": {"hidden_size": 96}, "train": {"fused": True, "precision": "bf16"}},
        ["train.fused = True", "model.hidden_size / model.num_heads is 24"],
    ),
    "nodes and sequences": (
        {"parallel": {"nodes": 4}, "train": {"batch_size": 6}},
        ["parallel.nodes = 4", "divide train.batch_size / train.accumulation_steps (6)"],
    ),
    "nodes and experts": (
        {"parallel": {"nodes": 4}, "moe": {"num_experts": 2}},
        ["parallel.nodes = 4", "divide moe.num_experts (2)"],
    ),
    "nodes and experts of a dense model": (
        {"parallel": {"nodes": 4}, "moe": {"num_experts": 2}, "model": {"num_moe_layers": 0}},
        ["parallel.nodes = 4", "divide moe.num_experts (2)"],
    ),
    "mixture of other domains": (
        {"data": {**TWO_DOMAINS, "mixture": {"en": 1.0}}},
        ["data.mixture = {'en': 1.0}", "exactly the domains of data.sources (en, zh)"],
    ),
    "negative share": (
        {"data": {**TWO_DOMAINS, "mixture": {"en": 2.0, "zh": -1.0}}},
        ["data.mixture = {'en': 2.0, 'zh': -1.0}", "at least 0"],
    ),
    "no share": (
        {"data": {**TWO_DOMAINS, "mixture": {"en": 0.0, "zh": 0.0}}},
        ["data.mixture = {'en': 0.0, 'zh': 0.0}", "one of them above 0"],
    ),
    "contents on one node": (
        {"data": {"sharding": "content"}},
        ["data.sharding = 'content'", "more than one node"],
    ),
    "sharding on one node": (
        {"data": {"sharding": "domain"}},
        ["data.sharding = 'domain'", "more than one node"],
    ),
    "accumulation": (
        {"train": {"batch_size": 8, "accumulation_steps": 3}},
        ["train.batch_size = 8", "divisible by train.accumulation_steps (3)"],
    ),
    "a key of an older version": (
        {"parallel": {"emulated_nodes": 4}},
        ["parallel.emulated_nodes = 4", "write parallel.nodes: 4"],
    ),
    "a key of an older version, at its default": (
        {"parallel": {"emulated_nodes": 1}},
        ["parallel.emulated_nodes = 1", "parallel.nodes", "leave it out"],
    ),
    "a key of an older version's jobs": (
        {"parallel": {"ranks_per_node": 2}},
        ["parallel.ranks_per_node = 2", "write parallel.nodes: N", "ranks divided by 2"],
    ),
    "an unset key of an older version": (
        {"parallel": {"ranks_per_node": None}},
        ["parallel.ranks_per_node = None", "leave it out"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_key_value_and_rule(name):
    values, parts = REFUSED[name]
    with pytest.raises(ConfigError) as raised:
        parse_config(values)
    line = [line for line in str(raised.value).splitlines() if line.startswith(parts[0])]
    assert len(line) == 1, raised.value
    for part in parts[1:]:
        assert part in line[0]


def test_every_problem_has_one_line_of_its_own():
    values = {"moe": {"routr": "hash", "capacity": {"statistic": [1]}}, "train": {"steps": 0}}
    with pytest.raises(ConfigError) as raised:
        parse_config(values)
    assert sorted(line.split(" = ")[0] for line in str(raised.value).splitlines()) == [
        "moe.capacity.statistic",
        "moe.routr",
        "train.steps",
    ]


def test_defaults_are_a_valid_configuration():
    assert parse_config({}) == Config()


def test_an_integer_is_a_number_too():
    learning_rate = parse_config({"train": {"learning_rate": 1}}).train.learning_rate
    assert (learning_rate, type(learning_rate)) == (1.0, float)


@pytest.mark.parametrize("statistic", ["min", "median", "mean", "max", 0.25, 0, 1])
def test_statistics_are_words_or_quantiles(statistic):
    assert (
        parse_config({"moe": {"capacity": {"statistic": statistic}}}).moe.capacity.statistic
        == statistic
    )


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Config().train.steps = 3


def test_domains_are_in_the_order_of_their_first_source():
    sources = [
        {"path": str(i), "domain": domain} for i, domain in enumerate(["zh", "en", "zh", "code"])
    ]
    config = parse_config(
        {
            "data": {"sources": sources},
            "moe": {"levels": 1},
            "train": {"batch_size": 12, "accumulation_steps": 3},
        }
    )
    assert config.domains == ("zh", "en", "code")
    assert config.micro_batch == 4


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_load(path):
    config = load_config(path)
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


def test_there_are_shipped_configurations():
    assert {"cpu_base", "cpu_smoke"} <= {path.stem for path in CONFIGS}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_wins_over_its_base_and_set_over_both(tmp_path):
    write(
        tmp_path,
        "base.yaml",
        "model: {hidden_size: 64, num_heads: 2}\ntrain: {steps: 7, seed: 5}\n",
    )
    write(
        tmp_path,
        "sub/middle.yaml",
        "base: ../base.yaml\nmodel: {hidden_size: 128}\nmoe: {capacity: {factor: 2.0}}\n",
    )
    top = write(tmp_path, "top.yaml", "base: sub/middle.yaml\ntrain: {steps: 9, warmup_steps: 0}\n")
    config = load_config(top, ["train.steps=11", "moe.capacity.policy=dropless"])
    assert (config.model.hidden_size, config.model.num_heads) == (128, 2)
    assert (config.train.steps, config.train.seed) == (11, 5)
    assert (config.moe.capacity.factor, config.moe.capacity.policy) == (2.0, "dropless")


def test_tables_by_domain_are_replaced_as_a_whole(tmp_path):
    write(
        tmp_path,
        "base.yaml",
        yaml.safe_dump({"data": {**TWO_DOMAINS, "mixture": {"en": 1.0, "zh": 3.0}}}),
    )
    top = write(
        tmp_path,
        "top.yaml",
        "base: base.yaml\ndata: {sources: [{path: a, domain: en}], mixture: {en: 2.0}}\n",
    )
    assert load_config(top).data.mixture == {"en": 2.0}


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("moe.router=switch", ("moe", "router", "switch")),
        ("moe.gate_scale=2", ("moe", "gate_scale", 2.0)),
        ("train.learning_rate=1e-3", ("train", "learning_rate", 1e-3)),
        ("train.learning_rate=2.5E+1", ("train", "learning_rate", 25.0)),
        ("data.tokenizer=null", ("data", "tokenizer", None)),
        ("data.tokenizer=a=b.json", ("data", "tokenizer", "a=b.json")),
        ("train.recompute=true", ("train", "recompute", True)),
    ],
)
def test_set(tmp_path, override, wanted):
    path = write(tmp_path, "a.yaml", "data: {tokenizer: t.json}\n")
    section, key, value = wanted
    assert getattr(getattr(load_config(path, [override]), section), key) == value


def test_set_takes_lists_and_tables(tmp_path):
    path = write(tmp_path, "a.yaml", "{}")
    overrides = [
        "data.sources=[{path: a, domain: en}, {path: b, domain: zh}]",
        "moe.group_sizes={en: 5, zh: 3}",
    ]
    config = load_config(path, overrides)
    assert config.domains == ("en", "zh")
    assert config.moe.group_sizes == {"en": 5, "zh": 3}


def test_values_set_from_python(tmp_path):
    path = write(tmp_path, "a.yaml", "moe: {router: locmoe}\n")
    sources = [{"path": "a", "domain": "en"}]
    config = load_config(
        path, {"data.sources": sources, "moe.router": "switch", "train.learning_rate": 0.1}
    )
    assert (config.domains, config.moe.router, config.train.learning_rate) == (
        ("en",),
        "switch",
        0.1,
    )
    for values, message in (
        ({"moe.router.name": "hash"}, r"moe\.router\.name = 'hash': router is a value"),
        ({"train.steps": "3"}, r"train\.steps = '3'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(path, values)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("moe.router", ["'moe.router'", "must be KEY=VALUE"]),
        ("=3", ["'=3'", "must be KEY=VALUE"]),
        ("moe.router=[", ["'moe.router=['", "not YAML"]),
        ("moe.router.name=hash", ["'moe.router.name=hash'", "router is a value, not a section"]),
        ("mode.router=hash", ["mode = {'router': 'hash'}", "unknown key", "did you mean model?"]),
        ("moe.routr=hash", ["moe.routr = 'hash'", "did you mean moe.router?"]),
        ("train.steps=1e3", ["train.steps = 1000.0", "must be an integer"]),
        ("train.steps=null", ["train.steps = None", "must be an integer"]),
    ],
)
def test_set_refusals(tmp_path, override, parts):
    path = write(tmp_path, "a.yaml", "moe: {router: locmoe}\n")
    with pytest.raises(ConfigError) as raised:
        load_config(path, [override])
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: a.yaml", "its own base"),
        ("base: b.yaml", "its own base"),
        ("base: missing.yaml", "missing.yaml: cannot be read: No such file"),
        ("base: [b.yaml]", "must be the path of another configuration file"),
        ("- model", "holds a list"),
        ("model: {hidden_size: 8", "not YAML"),
        ("model: {num_heads: 2}\nmodel: {hidden_size: 8}", "the key 'model' is given twice"),
        ("model: {hidden_size: 8, hidden_size: 16}", "the key 'hidden_size' is given twice"),
    ],
)
def test_unreadable_files(tmp_path, text, message):
    write(tmp_path, "b.yaml", "base: a.yaml\n")
    path = write(tmp_path, "a.yaml", text)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert message in str(raised.value)
    assert (
        "a.yaml" in str(raised.value)
        or "base = " in str(raised.value)
        or "missing.yaml" in str(raised.value)
    )


def test_an_empty_file_is_the_defaults(tmp_path):
    assert load_config(write(tmp_path, "a.yaml", "# nothing yet\n")) == Config()


def test_the_schema_knows_every_key_and_describes_it():
    schema = json.loads(json_schema())
    assert schema["additionalProperties"] is False
    assert "base" in schema["properties"]

    def keys(node: dict[str, Any], prefix: str) -> dict[str, dict[str, Any]]:
        found = {}
        for name, child in node["properties"].items():
            if "$ref" in child:
                section = schema["$defs"][child["$ref"].rpartition("/")[2]]
                assert section["additionalProperties"] is False
                found.update(keys(section, f"{prefix}{name}."))
            else:
                found[prefix + name] = child
        return found

    known = keys(schema, "")

    def leaves(values: dict[str, Any], prefix: str) -> list[str]:
        return [
            leaf
            for name, value in values.items()
            for leaf in (
                leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
            )
        ]

    assert set(leaves(Config().model_dump(), "")) == set(known) - {"base"}
    assert [
        key
        for key, node in known.items()
        if not node.get("description") and key.rpartition(".")[2] not in ("beta1", "beta2", "top_p")
    ] == []
    assert known["train.steps"]["minimum"] == 1
    assert known["moe.capacity.policy"]["enum"] == ["factor", "bound", "dynamic", "dropless"]


def test_the_schema_for_editors_is_up_to_date():
    assert (CONFIG_FOLDER / "schema.json").read_text(encoding="utf-8") == json_schema()


def test_off_needs_no_quotes(tmp_path):
    path = write(tmp_path, "a.yaml", "placement: {policy: off}\n")
    assert (
        load_config(path).placement.policy
        == load_config(path, ["placement.policy=off"]).placement.policy
        == "off"
    )


def test_doubtful_settings_are_said():
    on_one_node = parse_config({"moe": {"router": "locmoe"}})
    assert ["on one node" in line for line in doubtful_settings(on_one_node)] == [True]
    iid = parse_config(
        {"moe": {"router": "locmoe", "locality_loss": 0.1}, "parallel": {"nodes": 2}}
    )
    assert ["can only cost" in line for line in doubtful_settings(iid)] == [True]
    assert not list(doubtful_settings(parse_config({"moe": {"router": "hash"}})))
    unused = parse_config({"moe": {"router": "hash", "jitter": 0.1, "gate_scale": 2.0}})
    assert [line.partition(":")[0] for line in doubtful_settings(unused)] == [
        "moe.jitter = 0.1",
        "moe.gate_scale = 2.0",
    ]
    tight = parse_config({"moe": {"router": "hash", "capacity": {"factor": 0.75}}})
    assert [
        "at least 25% of the tokens are dropped" in line for line in doubtful_settings(tight)
    ] == [True]


@pytest.mark.parametrize(
    ("local", "said"), [(1.25, ["38% of them find no slot; 2 would hold all"]), (2.0, [])]
)
def test_static_slots_too_few_for_local_routing_are_said(local, said):
    capacity = {"local_factor": local, "remote_factor": 0.5}
    config = parse_config(
        {
            "moe": {"router": "hash", "capacity": capacity},
            "parallel": {"sizes": "static", "expert_parallel": 4, "nodes": 2},
        }
    )
    lines = list(doubtful_settings(config))
    assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines))


@pytest.mark.parametrize("steps, share", [(12, "40%"), (30, "100%")])
def test_a_run_may_end_inside_its_warm_up(steps, share):
    config = parse_config(
        {"moe": {"router": "hash"}, "train": {"warmup_steps": 30, "steps": steps}}
    )
    (line,) = doubtful_settings(config)
    assert line.startswith(
        f"train.warmup_steps = 30 with train.steps = {steps}: the run ends inside its "
        f"warm-up, at {share} of train.learning_rate"
    )
    assert not list(
        doubtful_settings(
            parse_config({"moe": {"router": "hash"}, "train": {"warmup_steps": 30, "steps": 31}})
        )
    )


@pytest.mark.parametrize(
    "parallel, sharding, nodes",
    [
        ({"emulated_nodes": 4, "ranks_per_node": None}, "domain", 4),
        ({"emulated_nodes": 1, "ranks_per_node": None}, "iid", 1),
        ({"emulated_nodes": 1, "expert_parallel": 4, "ranks_per_node": 2}, "domain", 2),
        ({"expert_parallel": 4, "tensor_parallel": 2, "ranks_per_node": 2}, "iid", 4),
        ({"expert_parallel": 4, "ranks_per_node": 4}, "iid", 1),
        (
            {"expert_parallel": 4, "ranks_per_node": 4},
            "domain",
            2,
        ),  # several, but how many is not kept
        ({"nodes": 4}, "domain", 4),
    ],
)
def test_the_file_of_an_older_run_still_loads(tmp_path, parallel, sharding, nodes):
    path = write(
        tmp_path,
        "config.yaml",
        json.dumps(
            {"parallel": parallel, "data": {"sharding": sharding}, "moe": {"router": "hash"}}
        ),
    )
    assert load_stored_config(path).parallel.nodes == nodes
    if "nodes" not in parallel:
        with pytest.raises(ConfigError, match=r"parallel\.nodes takes its place"):
            load_config(path)


def test_a_content_was_called_a_cluster(tmp_path):
    values = {"data": {"sharding": "cluster"}, "parallel": {"nodes": 2}}
    path = write(tmp_path, "config.yaml", json.dumps(values))
    content = parse_config({**values, "data": {"sharding": "content"}})
    assert load_config(path) == parse_config(values) == content
    assert load_stored_config(path).data == content.data
    assert content.data.sharding == "content" and '"cluster"' not in json_schema()


def test_the_locality_loss_defaults_to_nothing_where_it_can_only_cost():
    values = {"parallel": {"nodes": 2}}
    assert parse_config(values).locality_weight == 0
    assert parse_config({**values, "data": {"sharding": "domain"}}).locality_weight == 0.1
    assert parse_config({**values, "moe": {"locality_loss": 0.3}}).locality_weight == 0.3


@pytest.mark.parametrize(
    "domain", ["train", "validation", "..", "a/b", "a b", "zh-简体", "null", "é" * 64]
)
def test_a_domain_may_be_called_almost_anything(domain):
    assert parse_config({"data": {"sources": [{"path": "a", "domain": domain}]}}).domains == (
        domain,
    )


@pytest.mark.parametrize(
    "body, said",
    [
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt:"),
        ("class E(BaseException): pass\nraise E('a\\nb')", "E: a b"),
        (
            "print('loud'); import sys; print('more', file=sys.stderr); 1 / 0",
            "ZeroDivisionError: division by zero",
        ),
        ("def __getattr__(name): raise SystemExit(name)", "SystemExit: R"),
    ],
)
def test_whatever_a_router_module_does_is_one_line(tmp_path, monkeypatch, capsys, body, said):
    name = f"bad_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(
        ConfigError,
        match=rf"^moe\.router = '{name}:R': {name} cannot be imported: {re.escape(said)}\s?$",
    ):
        router_class(parse_config({"moe": {"router": f"{name}:R"}}))
    assert capsys.readouterr() == ("", "")


def test_what_a_router_module_prints_is_not_standard_output(tmp_path, monkeypatch, capsys):
    (tmp_path / "loud_router.py").write_text(
        "from pangu_locmoe.moe.routers.hash import HashRouter as R\nprint('loud')"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    router_class(parse_config({"moe": {"router": "loud_router:R"}}))
    assert capsys.readouterr() == ("", "loud\n")


@pytest.mark.parametrize("text", ["train: {seed: " + "9" * 5000 + "}", "[" * 1000])
def test_a_file_that_yaml_cannot_hold_is_one_line(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"^{file}: not YAML: [^\n]*$"):
        load_config(file)
