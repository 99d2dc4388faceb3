"""GrAP against a dense gate: the time of both, forward and backward, and the closed form of their
orthogonality.

Letters: T tokens, D hidden, E experts.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, List

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from pangu_locmoe.moe import gate
from study import verdict
from study.experiment import Case, Claim, Experiment, Measured

SIZES = [(1024, 128, 8), (4096, 256, 8), (4096, 1024, 16), (2048, 2560, 16), (1024, 5120, 16)]
"""T, D, E; the last is the paper's hidden size and experts"""


def cases(quick: bool) -> List[Case]:
    return [
        {"tokens": t, "hidden": d, "experts": e, "rounds": 10 if quick else 60}
        for t, d, e in (SIZES[:3] if quick else SIZES)
    ]


class DenseGate(nn.Cell):
    """What `switch` computes for its logits."""

    def construct(self, x_TD: Tensor, w_ED: Tensor) -> Tensor:
        return gate.dense_logits(x_TD, w_ED)


class Backward(nn.Cell):
    """Gradients of a gate with respect to all of its inputs."""

    def __init__(self, cell: nn.Cell) -> None:
        super().__init__()
        self.cell = cell
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, *inputs_and_sens: Tensor) -> Any:
        return self.gradient(self.cell)(*inputs_and_sens)


def measure(case: Case) -> Any:
    """Medians in milliseconds over rounds in which the two gates take turns, and the Gram matrix
    of GrAP's vectors.
    """
    tokens = case["tokens"]
    hidden = case["hidden"]
    experts = case["experts"]
    random = np.random.default_rng(1)
    x_TD, w_ED, sens_TE = (
        Tensor(random.standard_normal(shape).astype(np.float32))
        for shape in ((tokens, hidden), (experts, hidden), (tokens, experts))
    )
    dense = DenseGate()
    grap = gate.GroupedAveragePooling(experts)
    timed = {
        "dense_forward": (ms.jit(dense), (x_TD, w_ED)),
        "grap_forward": (ms.jit(grap), (x_TD,)),
        "dense_backward": (ms.jit(Backward(dense)), (x_TD, w_ED, sens_TE)),
        "grap_backward": (ms.jit(Backward(grap)), (x_TD, sens_TE)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(case["rounds"] + 3):
        for name, (function, inputs) in timed.items():
            started = time.perf_counter()
            found = function(*inputs)
            (found if isinstance(found, Tensor) else found[0]).asnumpy()
            seconds[name].append(time.perf_counter() - started)
    grap_ED = gate.grap_weights(hidden, experts)
    gram_EE = grap_ED @ grap_ED.T
    off_diagonal = gram_EE[~np.eye(experts, dtype=bool)]
    return {
        **{f"{name}_ms": 1e3 * statistics.median(values[3:]) for name, values in seconds.items()},
        "largest_inner_product": float(np.abs(off_diagonal).max()),
        "squared_norm_error": float(np.abs(np.diag(gram_EE) * hidden / experts - 1).max()),
        "dense_parameters": hidden * experts,
    }


def claims(measured: List[Measured]) -> List[Claim]:
    results = [row["result"] for row in measured]
    grap, dense = (
        [r[f"{name}_forward_ms"] + r[f"{name}_backward_ms"] for r in results]
        for name in ("grap", "dense")
    )
    saved = [1 - ours / other for ours, other in zip(grap, dense)]
    sizes = ", ".join(
        f"{m['case']['tokens']}x{m['case']['hidden']}x{m['case']['experts']}" for m in measured
    )
    each = "; ".join(f"{ours:.2f} / {other:.2f}" for ours, other in zip(grap, dense))
    inner = max(r["largest_inner_product"] for r in results)
    norms = max(r["squared_norm_error"] for r in results)
    return [
        Claim(
            "GrAP costs less than a dense gate",
            "d additions against n d multiply-adds for a token; no parameters",
            (
                f"forward and backward {verdict.spread(saved, '.0%')} shorter; GrAP / dense, "
                f"ms: {each}"
            ),
            f"{len(saved)} sizes (T x D x E): {sizes}",
            "compiled, the gates in turn, medians",
            *verdict.positive(saved, "forward and backward together are shorter"),
        ),
        Claim(
            "GrAP's gate vectors are orthogonal and of norm sqrt(n/d)",
            "by construction",
            f"largest inner product {inner:.1e}, norms off by {norms:.1e}",
            f"{len(saved)} sizes",
            "closed form, fp32",
            *verdict.at_most([inner, norms], 1e-6, 1e-3, ".0e"),
        ),
    ]


EXPERIMENT = Experiment("gates", cases, measure, claims)
