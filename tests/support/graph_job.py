"""One rank of a job in which the compiled step and the ordinary one train the same model: msrun ...
graph_job.py FOLDER CASE

Writes FOLDER/rank-R.json: the rows of both.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mindspore as ms

from pangu_locmoe.parallel.world import join

STEPS = 4
VOCAB = 300
LENGTH = 8
BATCH = 8


@dataclass(frozen=True)
class Case:
    """What differs from the configuration in `main`."""

    parallel: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


FP16 = {"precision": "fp16", "loss_scale": 2.0**16, "loss_scale_window": 2}
PLACES = {"expert_parallel": 2, "tensor_parallel": 2}
CASES = {
    "expert parallel": Case(),
    "sharded, half precision": Case({"shard_optimizer": True}, FP16),
    "chunks": Case({"overlap_chunks": 2}),
    "sharded": Case({"expert_parallel": 2, "shard_optimizer": True}),
    "sharded, accumulation": Case(
        {"expert_parallel": 2, "shard_optimizer": True}, {"accumulation_steps": 2}
    ),
    "tensor parallel, groupwise": Case({**PLACES, "exchange": "groupwise"}),
    "sequence parallel": Case({**PLACES, "sequence_parallel": True}),
    "tensor parallel, sharded, half precision": Case(
        {**PLACES, "shard_optimizer": True}, {**FP16, "accumulation_steps": 2}
    ),
}


def main() -> int:
    # Kernels one after the other: two collectives at once would reach the ranks in different
    # orders.
    ms.runtime.dispatch_threads_num(1)
    mccl = join()

    import numpy as np

    from pangu_locmoe.data.loader import Batch
    from pangu_locmoe.model.sigma import PanguSigma
    from pangu_locmoe.parallel.world import World
    from pangu_locmoe.train.step import CountsStepper, GraphStepper
    from support import stand_ins
    from support.small import small_config

    operators = stand_ins.install(mccl.rank, mccl.size)

    def rows(case: Case, communicator: Any, kind: Any) -> list[Any]:
        config = small_config(
            model={"num_layers": 2},
            moe={
                "num_experts": 8,
                "locality_loss": 0.1,
                "capacity": {"local_factor": 2.0, "remote_factor": 1.0},
            },
            parallel={
                "expert_parallel": mccl.size,
                "nodes": mccl.size // 2,
                "sizes": "static",
                **case.parallel,
            },
            train={"batch_size": BATCH, "epsilon": 1e-6, "mode": "pynative", **case.train},
        )
        world = World.of(config, communicator)
        model = PanguSigma(config, None, world.topology, world.exchange, world.tensor)
        stepper = kind(model, config, world, (8,) * config.model.num_moe_layers)
        found = []
        for step in range(1, STEPS + 1):
            random = np.random.default_rng(step)
            tokens = random.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
            positions = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
            zeros = np.zeros((BATCH, LENGTH), np.int32)
            batch = Batch(
                tokens[:, :-1].copy(),
                tokens[:, 1:].copy(),
                positions,
                zeros,
                np.arange(BATCH, dtype=np.int32) % 2,
                np.ones(BATCH, bool),
            )
            result = stepper(batch, step, 5e-4)
            found.append(
                {
                    "losses": [*result.losses.values()],
                    "norm": result.grad_norm,
                    "load": result.load_LNE.tolist(),
                    "dropped": result.dropped_LE.tolist(),
                    "skipped": result.skipped,
                    "loss_scale": stepper.loss_scale and stepper.loss_scale.value,
                    "traffic": [
                        vars(part)[name]
                        for part in (result.traffic, result.traffic.reduction)
                        for name in ("intra_node_bytes", "inter_node_bytes")
                    ],
                }
            )
        return found

    case = CASES[sys.argv[2]]
    found = {}
    for kind, communicator, stepper in (
        ("ordinary", mccl, CountsStepper),
        ("compiled", operators, GraphStepper),
    ):
        found[kind] = rows(case, communicator, stepper)
    (Path(sys.argv[1]) / f"rank-{mccl.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
