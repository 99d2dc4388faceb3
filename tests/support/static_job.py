"""What msrun starts for test_static_job.py: a static layer shared by all ranks, against ordinary
layers, one per source.

With the same capacity for local and remote experts a source's part of the result is that of an
ordinary layer on its tokens alone; an expert's gradient is the sum over the sources.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pangu_locmoe.parallel.world import join

communicator = join()

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
from mindspore import ops  # noqa: E402

from pangu_locmoe.moe.capacity import factor_capacity  # noqa: E402
from pangu_locmoe.moe.domains import allowed_experts  # noqa: E402
from pangu_locmoe.moe.layer import MoELayer  # noqa: E402
from pangu_locmoe.moe.routers.base import RouterContext  # noqa: E402
from pangu_locmoe.parallel.exchange import Exchange  # noqa: E402
from pangu_locmoe.parallel.topology import Topology  # noqa: E402
from support.numeric import close, integers, no_noise, tensor  # noqa: E402
from support.small import small_config  # noqa: E402

TOKENS = 16
HIDDEN = 16
EXPERTS = 4
FACTOR = 1.25
rank = communicator.rank
size = communicator.size
random = np.random.default_rng(5)
x_RTD, sens_RTD = random.standard_normal((2, size, TOKENS, HIDDEN))
tokens_T = integers(random.integers(0, 300, TOKENS))
domains_T = integers(np.repeat([0, 1], TOKENS // 2))
keys = no_noise(TOKENS, HIDDEN)


def config_of(router, overlap_chunks):
    return small_config(
        moe={
            "router": router,
            "balance_loss": 0.0,
            "locality_loss": 0.0,
            "capacity": {"local_factor": FACTOR, "remote_factor": FACTOR},
        },
        parallel={"expert_parallel": 2, "sizes": "static", "overlap_chunks": overlap_chunks},
        train={"batch_size": 2 * size},
    )


def context(config, topology: Topology) -> RouterContext:
    allowed_JE = allowed_experts(config)
    return RouterContext(0, allowed_JE, topology, np.ones((len(allowed_JE), 300), np.int64))


def outcome(layer, source):
    """y_TD, and the gradients of sum(sens * y) by x and by the experts' weights."""
    capacity = factor_capacity(FACTOR, TOKENS, EXPERTS)
    x_TD = tensor(x_RTD[source])
    weights = ms.ParameterTuple([layer.experts.w_in, layer.experts.w_out])

    def objective(x_TD):
        y_TD, stats = layer(x_TD, tokens_T, domains_T, keys, capacity, True)
        return ops.reduce_sum(y_TD * tensor(sens_RTD[source])), y_TD, stats["dropped_E"]

    (_, y_TD, dropped_E), (dx_TD, (dw_in, dw_out)) = ms.value_and_grad(
        objective, 0, weights, has_aux=True
    )(x_TD)
    return [array.asnumpy() for array in (y_TD, dropped_E, dx_TD, dw_in, dw_out)]


topology = Topology(size, size // 2, size, EXPERTS)
exchange = Exchange(communicator, range(size), [r // (size // 2) for r in range(size)])
held = topology.experts_of_rank(rank)
for router, chunks in (("switch", 1), ("switch", 5), ("locmoe_plus", 1), ("locmoe_plus", 5)):
    config = config_of(router, chunks)
    exchange.ledger.take()
    got = outcome(MoELayer.of(config, context(config, topology), exchange), rank)
    assert exchange.ledger.take().inter_node_messages == (size // 2) * 4 * chunks
    ordinary = MoELayer.of(config, context(config, Topology(1, 1, 1, EXPERTS)))
    alone = [outcome(ordinary, source) for source in range(size)]
    for mine, wanted in zip(got[:3], alone[rank][:3]):
        close(mine, wanted, 2e-6)
    for mine, parts in zip(got[3:], zip(*[part[3:] for part in alone])):
        close(mine, sum(parts)[held.start : held.stop], 4e-6)
    assert sum(part[1].sum() for part in alone) > 0, "nothing was dropped"
communicator.barrier()
print("the same", flush=True)
