"""The runs that must not depend on the number of processes, in both forms: on one process and as a
rank of a job.

The batches repeat, so that the model learns; with the small learning rate and the larger epsilon
Adam does not blow up the rounding of gradients near zero, and 1e-5 over 20 steps is a fair demand.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field
from typing import Any, Optional

import mindspore as ms
import numpy as np
from mindspore import Tensor

from pangu_locmoe.config import Config, parse_config
from pangu_locmoe.data.loader import Batch
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.nn.noise import draw_keys
from pangu_locmoe.parallel.communicator import Communicator
from pangu_locmoe.parallel.gradients import is_expert, kind
from pangu_locmoe.parallel.world import World
from pangu_locmoe.train.policies.balance import Balance
from pangu_locmoe.train.step import Objective, Stepper, StepResult, make_stepper
from pangu_locmoe.train.step.objective import batch_inputs

VOCAB = 300
LENGTH = 16
BATCH = 24
EXPERTS = 12
DOMAINS = 4
STEPS = 20
RATE = 5e-4


@dataclass(frozen=True)
class Case:
    """moe, model, train: what differs from `base`. nodes: of the job, and emulated by the single
    process.

    expert_parallel: None is all replicas. tensor: ranks of a replica. shard: the optimizer's
    moments. rows: sequence parallelism. idle: all tokens go to expert 0. moves: experts change
    their ranks on the way. static: constant sizes, with a slot for every token. reduction: of the
    gradients; None is by node where there are several of several ranks.
    """

    moe: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    nodes: int = 1
    exchange: str = "flat"
    expert_parallel: Optional[int] = None
    tensor: int = 1
    shard: bool = False
    rows: bool = False
    idle: bool = False
    moves: bool = False
    static: bool = False
    reduction: Optional[str] = None
    steps: int = STEPS

    def config(self, ranks: int) -> Config:
        parallel: dict[str, Any] = {"nodes": self.nodes}
        moe = self.moe
        if ranks > 1 and self.static:
            moe = {
                **moe,
                "capacity": {"local_factor": float(EXPERTS), "remote_factor": float(EXPERTS)},
            }
        if ranks > 1:
            parallel |= {
                "exchange": self.exchange,
                "sizes": "static" if self.static else "counts",
                "reduction": self.reduction,
                "expert_parallel": self.expert_parallel or ranks // self.tensor,
                "tensor_parallel": self.tensor,
                "shard_optimizer": self.shard,
                "sequence_parallel": self.rows,
            }
        return parse_config(
            {
                "model": {
                    "vocab_size": VOCAB,
                    "hidden_size": 48,
                    "num_layers": 2,
                    "num_moe_layers": 1,
                    "num_heads": 4,
                    "ffn_size": 64,
                    "seq_length": LENGTH,
                    "init_std": 0.1,
                    **self.model,
                },
                "moe": {
                    "router": "locmoe",
                    "num_experts": EXPERTS,
                    "levels": 1,
                    "locality_loss": 0.1,
                    **moe,
                },
                "data": {
                    "sources": [
                        {"path": f"corpus/{domain}", "domain": str(domain)}
                        for domain in range(DOMAINS)
                    ]
                },
                "train": {
                    "steps": STEPS,
                    "batch_size": BATCH,
                    "warmup_steps": 0,
                    "epsilon": 1e-6,
                    "mode": "pynative",
                    **self.train,
                },
                "parallel": parallel,
            }
        )


DROPLESS = {"policy": "dropless"}
TIGHT = {"factor": 1.0}
PLUS = {"router": "locmoe_plus", "token_choice": {"threshold": 0.4, "max_experts": 3}}
# Losses that a router of the user's own brings, weighed so that a difference would be seen.
OWN = {"router": "support.own_routers:OwnLosses", "balance_loss": 0.5, "z_loss": 0.1}
UNBALANCED = {"router": "support.own_routers:Unbalanced", "balance_loss": 0.5}
LOCAL_HASH = {"router": "local_hash", "capacity": {"factor": 1.0}}
QUANTILE = {"balance": "quantile", "token_prior": 1.0, "weight": "unit", "capacity": TIGHT}
# Two experts for a token, and one that all tokens share.
TOP_2 = {"router": "switch", "top_k": 2, "weight": "normalized", "shared_experts": 1}
CASES = {
    "hash": Case({"router": "hash", "capacity": TIGHT}),
    "hash by position": Case(
        {"router": "hash", "levels": 2, "capacity": {"factor": 1.0, "drop_order": "position"}},
        nodes=2,
    ),
    "switch": Case({"router": "switch", "capacity": TIGHT}),
    "switch, noise": Case(
        {"router": "switch", "capacity": TIGHT, "z_loss": 0.01, "jitter": 0.05}, {"dropout": 0.2}
    ),
    "switch, nodes": Case({"router": "switch", "capacity": TIGHT}, nodes=2),
    "switch, nodes, hierarchical": Case(
        {"router": "switch", "capacity": TIGHT}, nodes=2, exchange="hierarchical"
    ),
    "locmoe": Case({"capacity": TIGHT}, {"num_layers": 4, "num_moe_layers": 2}, {"mode": "graph"}),
    "compiled": Case({"capacity": TIGHT}, train={"mode": "graph"}),
    "locmoe, nodes": Case({"capacity": TIGHT}, nodes=2),
    "locmoe, nodes, hierarchical": Case({"capacity": TIGHT}, nodes=2, exchange="hierarchical"),
    "locmoe, nodes, flat reduction": Case({"capacity": TIGHT}, nodes=2, reduction="flat"),
    "locmoe, nodes, moves": Case({"capacity": TIGHT}, nodes=2, moves=True),
    "locmoe, dropless": Case({"capacity": DROPLESS}),
    "locmoe, dropless, nodes": Case({"capacity": DROPLESS}, nodes=2),
    "locmoe, dropless, nodes, hierarchical": Case(
        {"capacity": DROPLESS}, nodes=2, exchange="hierarchical"
    ),
    "locmoe_plus, nodes": Case({**PLUS, "capacity": TIGHT}, nodes=2),
    "locmoe_plus, compiled": Case(
        {**PLUS, "capacity": TIGHT}, {"num_layers": 4, "num_moe_layers": 2}, {"mode": "graph"}
    ),
    "locmoe_plus, dropless, nodes, hierarchical": Case(
        {**PLUS, "capacity": DROPLESS}, nodes=2, exchange="hierarchical"
    ),
    "locmoe_plus, two levels, accumulation": Case(
        {**PLUS, "levels": 2, "capacity": TIGHT},
        train={"accumulation_steps": 3},
        nodes=2,
        moves=True,
    ),
    "two levels": Case({"levels": 2, "capacity": TIGHT}, nodes=2),
    "two levels, dropless": Case(
        {"levels": 2, "capacity": DROPLESS, "group_sizes": {"0": 6, "1": 3, "2": 2, "3": 1}}
    ),
    "three nodes": Case({"capacity": TIGHT}, nodes=3),
    "three nodes, hierarchical": Case({"capacity": TIGHT}, nodes=3, exchange="hierarchical"),
    "accumulation": Case({"capacity": TIGHT, "balance_loss": 0.5}, train={"accumulation_steps": 3}),
    "accumulation, nodes": Case(
        {"router": "switch", "capacity": DROPLESS, "balance_loss": 0.5},
        {"dropout": 0.2},
        {"accumulation_steps": 3},
        nodes=2,
    ),
    "data and expert parallel, moves": Case(
        {"capacity": DROPLESS},
        {"num_layers": 4, "num_moe_layers": 2},
        nodes=2,
        exchange="hierarchical",
        moves=True,
    ),
    "data and expert parallel": Case({"capacity": DROPLESS}, expert_parallel=2),
    "data and expert parallel, nodes": Case(
        {"router": "switch", "capacity": DROPLESS}, nodes=2, expert_parallel=2
    ),
    "data parallel": Case({"capacity": DROPLESS}, expert_parallel=1),
    "data parallel, nodes": Case(
        {"router": "switch", "capacity": DROPLESS},
        train={"accumulation_steps": 3},
        nodes=2,
        expert_parallel=1,
    ),
    "data parallel, nodes, sharded, half precision": Case(
        {"router": "switch", "capacity": DROPLESS},
        train={"precision": "fp16", "loss_scale": 1024.0},
        nodes=2,
        expert_parallel=1,
        shard=True,
        steps=3,
    ),
    "expert groups in nodes, sharded": Case(
        {"router": "switch", "capacity": DROPLESS},
        nodes=2,
        expert_parallel=2,
        shard=True,
        moves=True,
    ),
    "tensor and expert parallel": Case({"capacity": TIGHT}, {"dropout": 0.2}, nodes=2, tensor=2),
    "tensor and expert parallel, groupwise": Case(
        {"capacity": TIGHT}, {"dropout": 0.2}, nodes=2, tensor=2, exchange="groupwise"
    ),
    "tensor and expert parallel, compiled": Case(
        {"capacity": TIGHT},
        {"num_layers": 4, "num_moe_layers": 2},
        {"mode": "graph"},
        nodes=2,
        tensor=2,
    ),
    "tensor and expert parallel, moves": Case(
        {"capacity": TIGHT}, nodes=2, tensor=2, exchange="groupwise", moves=True
    ),
    "tensor parallel": Case(
        {"capacity": TIGHT}, {"num_layers": 4, "num_moe_layers": 2}, expert_parallel=1, tensor=2
    ),
    "tensor and data parallel": Case(
        {"router": "switch", "capacity": DROPLESS},
        {"domain_embeddings": True},
        expert_parallel=1,
        tensor=2,
    ),
    "sequence parallel, compiled": Case(
        {"capacity": TIGHT},
        {"dropout": 0.2, "num_layers": 3},
        {"mode": "graph"},
        nodes=2,
        tensor=2,
        rows=True,
    ),
    "sequence parallel": Case(
        {"capacity": TIGHT}, {"num_layers": 4, "num_moe_layers": 2}, nodes=2, tensor=2, rows=True
    ),
    "sequence parallel, sharded, domains": Case(
        {"router": "switch", "capacity": DROPLESS},
        {"domain_embeddings": True},
        expert_parallel=1,
        tensor=2,
        rows=True,
        shard=True,
    ),
    "sequence parallel by four": Case(
        {"router": "hash", "capacity": TIGHT},
        {"dropout": 0.2},
        expert_parallel=1,
        tensor=4,
        rows=True,
    ),
    "tensor parallel by four": Case(
        {"router": "hash", "capacity": TIGHT}, expert_parallel=1, tensor=4
    ),
    "sharded": Case({"capacity": DROPLESS}, expert_parallel=2, shard=True, moves=True),
    "sharded, tensor parallel": Case(
        {"router": "switch", "capacity": DROPLESS},
        {"domain_embeddings": True},
        expert_parallel=1,
        tensor=2,
        shard=True,
    ),
    "sharded, tensor and expert parallel": Case(
        {"capacity": TIGHT}, {"dropout": 0.2}, nodes=2, tensor=2, exchange="groupwise", shard=True
    ),
    "sharded, accumulation": Case(
        {"router": "switch", "capacity": DROPLESS},
        train={"accumulation_steps": 3},
        expert_parallel=1,
        shard=True,
    ),
    "sharded, half precision": Case(
        {"router": "switch", "capacity": DROPLESS},
        train={"precision": "fp16", "loss_scale": 1024.0},
        expert_parallel=1,
        shard=True,
        steps=3,
    ),
    "idle": Case({"router": "hash", "capacity": DROPLESS}, idle=True),
    "idle, drops": Case(
        {"router": "hash", "capacity": TIGHT}, nodes=2, idle=True, exchange="hierarchical"
    ),
    "locmoe, static": Case({"capacity": DROPLESS, "balance_loss": 0.5}, nodes=2, static=True),
    "locmoe_plus, static, compiled": Case(
        {**PLUS, "capacity": DROPLESS}, train={"mode": "graph"}, nodes=2, static=True
    ),
    "own losses": Case({**OWN, "capacity": TIGHT}, nodes=2),
    "own losses, static": Case({**OWN, "capacity": DROPLESS}, nodes=2, static=True),
    "own losses, compiled": Case(
        {**OWN, "capacity": DROPLESS},
        {"num_layers": 4, "num_moe_layers": 2},
        {"mode": "graph", "accumulation_steps": 3},
    ),
    "own losses, tensor and data parallel": Case(
        {**OWN, "capacity": DROPLESS}, expert_parallel=1, tensor=2
    ),
    "no balance loss": Case({**UNBALANCED, "capacity": TIGHT}, nodes=2),
    "no balance loss, static": Case({**UNBALANCED, "capacity": DROPLESS}, nodes=2, static=True),
    "local_hash, nodes": Case(LOCAL_HASH, nodes=2),
    "local_hash, quantile, nodes, moves": Case(
        {**LOCAL_HASH, "balance": "quantile", "weight": "probability"}, nodes=2, moves=True
    ),
    "local_hash, static": Case(
        {**LOCAL_HASH, "balance": "quantile", "capacity": DROPLESS}, nodes=2, static=True
    ),
    "local_hash, tensor and expert parallel": Case(LOCAL_HASH, nodes=2, tensor=2),
    "quantile, compiled": Case(
        QUANTILE, {"num_layers": 4, "num_moe_layers": 2}, {"mode": "graph"}, nodes=2
    ),
    "quantile, two levels": Case(
        {**QUANTILE, "levels": 2, "learn_token_prior": True},
        train={"accumulation_steps": 3},
        nodes=2,
    ),
    "quantile, tensor and expert parallel": Case(QUANTILE, nodes=2, tensor=2),
    "quantile, static": Case({**QUANTILE, "capacity": DROPLESS}, nodes=2, static=True),
    "bias": Case({"router": "switch", "balance": "bias", "bias_rate": 0.01, "capacity": TIGHT}),
    "top-2, nodes, hierarchical": Case(
        {**TOP_2, "capacity": TIGHT}, nodes=2, exchange="hierarchical", moves=True
    ),
    "top-2, compiled": Case({**TOP_2, "capacity": TIGHT}, train={"mode": "graph"}),
    "top-2, tensor and expert parallel": Case({**TOP_2, "capacity": TIGHT}, nodes=2, tensor=2),
    "top-2, sequence parallel, compiled": Case(
        {**TOP_2, "balance": "quantile", "capacity": TIGHT},
        {"dropout": 0.2},
        {"mode": "graph"},
        nodes=2,
        tensor=2,
        rows=True,
    ),
    "top-2, static": Case({**TOP_2, "capacity": DROPLESS}, nodes=2, static=True),
    "half precision": Case(
        {"router": "switch", "capacity": TIGHT},
        train={"precision": "fp16", "loss_scale": 1024.0},
        steps=3,
    ),
}
# The cases of the everyday suite, and how many steps of them; the slow tests run all that the
# number of ranks allows to the end.
EVERYDAY = {
    2: {
        "two levels": 6,
        "data parallel": 6,
        "idle": 3,
        "half precision": 3,
        "locmoe, static": 3,
        "own losses": 3,
        "own losses, static": 3,
        "no balance loss": 3,
        "no balance loss, static": 3,
        "local_hash, static": 3,
        "top-2, static": 3,
    },
    3: {"three nodes": 6},
    4: {
        "locmoe, nodes": STEPS,
        "locmoe, nodes, hierarchical": 6,
        "locmoe, nodes, flat reduction": 3,
        "locmoe, nodes, moves": 11,
        "locmoe_plus, nodes": 6,
        "compiled": 3,
        "tensor and expert parallel": 6,
        "tensor and expert parallel, groupwise": 6,
        "sharded": 6,
        "local_hash, quantile, nodes, moves": 6,
        "top-2, tensor and expert parallel": 3,
    },
}
GRADIENTS = (
    "locmoe, nodes",
    "top-2, static",
    "data parallel",
    "idle",
    "locmoe, static",
    "own losses",
    "own losses, static",
    "no balance loss",
    "no balance loss, static",
)


def possible(ranks: int) -> list[str]:
    """The cases that fit a number of ranks, and are the single process there: with drops all
    replicas must share their experts.
    """
    return [
        name
        for name, case in CASES.items()
        if ranks % case.nodes == 0
        and ranks % (case.expert_parallel or 1) == 0
        and ranks % ((case.expert_parallel or 1) * case.tensor) == 0
        and (ranks // case.nodes) % case.tensor == 0
        and (case.expert_parallel or 1) < ranks
        and (
            case.moe["capacity"] == DROPLESS
            or (case.expert_parallel or ranks // case.tensor) * case.tensor == ranks
        )
        and BATCH % (ranks * case.train.get("accumulation_steps", 1)) == 0
    ]


@functools.cache
def _batch(seed: int) -> Batch:
    """Token sequences with a rule in them."""
    generator = np.random.default_rng([5, seed])
    domains_B = np.arange(BATCH, dtype=np.int32) // (BATCH // DOMAINS)
    start_B = generator.integers(0, 60, BATCH)
    stride_B = generator.integers(1, 4, BATCH)
    tokens = (
        start_B[:, None] + stride_B[:, None] * np.arange(LENGTH + 1) + 61 * domains_B[:, None]
    ) % VOCAB
    tokens = tokens.astype(np.int32)
    positions_BS = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
    segments_BS = np.repeat((np.arange(LENGTH, dtype=np.int32) >= 10)[None], BATCH, 0).astype(
        np.int32
    )
    return Batch(
        tokens[:, :-1].copy(),
        tokens[:, 1:].copy(),
        positions_BS,
        segments_BS,
        domains_B,
        np.ones(BATCH, bool),
    )


def batch(step: int) -> Batch:
    """One of three, in turn."""
    return _batch((step - 1) % 3)


def stepper_of(case: Case, communicator: Optional[Communicator] = None) -> Stepper:
    """A rank's fresh model and optimizer, as Trainer makes them."""
    ranks = communicator.size if communicator else 1
    config = case.config(ranks)
    world = World.of(config, communicator)
    model = PanguSigma(config, None, world.topology, world.exchange, world.tensor)
    if case.idle:
        for block in model.blocks:
            if block.sparse:
                block.moe.router.table.set_data(
                    Tensor(np.zeros_like(block.moe.router.table.asnumpy()))
                )
    return make_stepper(model, config, world)


def row(result: StepResult) -> dict[str, Any]:
    traffic = (
        {}
        if result.traffic is None
        else {
            **{
                name: value
                for name, value in vars(result.traffic).items()
                if not name.endswith("seconds") and name != "reduction"
            },
            **{f"reduce_{name}": value for name, value in vars(result.traffic.reduction).items()},
        }
    )
    return {
        "losses": [*result.losses.values(), result.grad_norm],
        "bias": None if result.bias_LX is None else result.bias_LX.tolist(),
        "load": result.load_LNE.tolist(),
        "dropped": result.dropped_LE.tolist(),
        "skipped": result.skipped,
        "unrouted": result.unrouted,
        **traffic,
    }


class Run:
    """One process or one rank of a case, step by step."""

    def __init__(self, case: Case, communicator: Optional[Communicator] = None) -> None:
        self.stepper = stepper_of(case, communicator)
        self.moves = case.moves and communicator is not None
        self.balance: list[Balance] = []
        if Balance.wanted(self.stepper.config):
            self.balance.append(Balance(self.stepper.config, self.stepper))
        self._rows: list[dict[str, Any]] = []

    def rows(self, steps: int) -> list[dict[str, Any]]:
        """A row for each of the first steps, as many as are not made yet made now."""
        for number in range(len(self._rows) + 1, steps + 1):
            if self.moves and number % 5 == 0:
                shuffle_experts(self.stepper, number)
            result = self.stepper(batch(number), number, RATE)
            for policy in self.balance:
                assert list(policy(number, result)) == []
            self._rows.append(row(result))
        return self._rows[:steps]

    def digest(self) -> str:
        """Of the weights that are whole on all ranks."""
        digest = hashlib.sha256()
        for parameter in self.stepper.parameters:
            if kind(parameter) == "whole":
                digest.update(parameter.asnumpy().tobytes())
        return digest.hexdigest()


def shuffle_experts(stepper: Stepper, seed: int) -> None:
    """Another slot for every expert, and another one in each layer."""
    random = np.random.default_rng(seed)
    next_expert_of_slot_LP = np.stack(
        [random.permutation(EXPERTS) for _ in stepper.model.moe_layers]
    )
    stepper.move_experts(next_expert_of_slot_LP)
    np.testing.assert_array_equal(stepper.expert_of_slot_LP, next_expert_of_slot_LP)


def reduced_gradients(case: Case, communicator: Communicator) -> dict[str, np.ndarray]:
    """What a rank's optimizer is given at the first step; experts by their global id."""
    stepper = stepper_of(case, communicator)
    kept: list[Any] = []
    before = stepper._reduce

    def keep(factor: float) -> Any:
        norm = before(factor)
        kept.append([gradient / factor for gradient in stepper._gradients])
        return norm

    stepper._reduce = keep
    stepper(batch(1), 1, RATE)
    first = stepper.world.topology.experts_of_rank(communicator.rank).start
    return _by_expert(
        stepper,
        [gradient.asnumpy() for gradient in kept[0]],
        first,
        stepper.config.train.accumulation_steps,
    )


def single_gradients(case: Case) -> dict[str, np.ndarray]:
    """The same of the single process, without the stepper: the mean over its micro-batches."""
    stepper = stepper_of(case)
    config = stepper.config
    first = batch(1)
    parts = stepper.config.train.accumulation_steps
    rows_T, columns_D = draw_keys(
        config.train.seed, 1, first.tokens_BS.size, config.model.hidden_size
    )
    gradient = ms.value_and_grad(
        Objective(stepper.model, config, stepper.capacities),
        None,
        stepper.optimizer.parameters,
        has_aux=True,
    )
    found: list[np.ndarray] = []
    for part in np.arange(BATCH).reshape(case.nodes, parts, -1).swapaxes(0, 1).reshape(parts, -1):
        inputs = batch_inputs(first, rows_T.reshape(first.tokens_BS.shape), Tensor(columns_D), part)
        values = [value.asnumpy() for value in gradient(*inputs, Tensor(1.0, ms.float32))[1]]
        found = [total + value for total, value in zip(found, values)] if found else values
    return _by_expert(stepper, found, 0, parts)


def _by_expert(
    stepper: Stepper, gradients: list[np.ndarray], first: int, parts: int
) -> dict[str, np.ndarray]:
    named = {}
    for parameter, gradient in zip(stepper.parameters, gradients):
        if is_expert(parameter):
            named.update(
                (f"{parameter.name}.{first + position}", value / parts)
                for position, value in enumerate(gradient)
            )
        else:
            named[parameter.name] = gradient / parts
    return named
