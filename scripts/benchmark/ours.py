"""Our side of the speed comparison: pangu_locmoe training steps on the CPU, driven line by line as
hf.py is.

Uses what `pangu-locmoe train` uses: parse_config, PanguSigma and LocalStepper, with every statistic
a run records copied to the host; only the text is replaced by random tokens. With ``--gate D,E`` it
times the two gates instead and prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from benchmark.hf import Parser, add_shape_flags, count, say, serve


def gate_size(text: str) -> Tuple[int, int]:
    """'256,8' -> hidden size 256, 8 experts."""
    words = text.split(",")
    if (
        len(words) != 2
        or not all(word.isdigit() and int(word) for word in words)
        or int(words[0]) % int(words[1])
    ):
        raise argparse.ArgumentTypeError(
            f"must be HIDDEN,EXPERTS with EXPERTS a divisor of HIDDEN, not {text!r}"
        )
    return int(words[0]), int(words[1])


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the flags; the defaults are the comparison of docs/performance.md."""
    parser = Parser(str(__doc__).splitlines()[0])
    add_shape_flags(parser)
    parser.add_argument(
        "--num-layers", type=count, default=5, help="all layers, the query layer included"
    )
    parser.add_argument(
        "--num-moe-layers", type=int, default=4, help="sparse layers; 0: the dense twin"
    )
    parser.add_argument(
        "--ffn",
        type=count,
        default=1024,
        help="inner width of a feed-forward network and of an expert",
    )
    parser.add_argument(
        "--experts", type=count, default=8, help="experts in each sparse layer, top-1"
    )
    parser.add_argument("--router", default="switch", help="switch, locmoe or hash")
    parser.add_argument(
        "--capacity", default="factor", choices=["factor", "dropless"], help="capacity policy"
    )
    parser.add_argument(
        "--capacity-factor",
        type=float,
        default=1.25,
        help="slots of an expert, as a multiple of tokens / experts",
    )
    parser.add_argument(
        "--gate",
        type=gate_size,
        default=None,
        metavar="D,E",
        help="time GrAP and the dense gate at hidden size D with E experts, then end",
    )
    parser.add_argument("--gate-rounds", type=count, default=20, help="rounds of the gate timing")
    return parser.parse_args(argv)


def run_config(arguments: argparse.Namespace) -> Dict[str, Any]:
    """The run as the YAML would say it."""
    return {
        "model": {
            "vocab_size": arguments.vocabulary,
            "hidden_size": arguments.hidden,
            "num_layers": arguments.num_layers,
            "num_moe_layers": arguments.num_moe_layers,
            "num_heads": arguments.heads,
            "ffn_size": arguments.ffn,
            "seq_length": arguments.sequence,
        },
        "moe": {
            "router": arguments.router,
            "num_experts": arguments.experts,
            "levels": 1,
            "capacity": {"policy": arguments.capacity, "factor": arguments.capacity_factor},
        },
        "train": {
            "batch_size": arguments.batch,
            "learning_rate": arguments.learning_rate,
            "seed": arguments.seed,
        },
    }


class Trainer:
    """One model and its LocalStepper, endless random batches of shape [batch, sequence]."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import mindspore as ms

        from pangu_locmoe.config import parse_config
        from pangu_locmoe.data.loader import Batch
        from pangu_locmoe.model.sigma import PanguSigma
        from pangu_locmoe.model.size import num_params
        from pangu_locmoe.train.step import LocalStepper

        config = parse_config(run_config(arguments))
        self.versions = {"mindspore": ms.__version__}
        self.parameters = num_params(config)
        self.learning_rate = arguments.learning_rate
        self.stepper = LocalStepper(PanguSigma(config), config)
        generator = np.random.default_rng(arguments.seed)
        shape = (arguments.batch, arguments.sequence)
        positions_BS = np.tile(np.arange(arguments.sequence, dtype=np.int32), (arguments.batch, 1))
        self.batches: List[Batch] = []
        for _ in range(8):
            tokens = generator.integers(
                0, arguments.vocabulary, (arguments.batch, arguments.sequence + 1), dtype=np.int32
            )
            self.batches.append(
                Batch(
                    tokens_BS=np.ascontiguousarray(tokens[:, :-1]),
                    targets_BS=np.ascontiguousarray(tokens[:, 1:]),
                    positions_BS=positions_BS,
                    segments_BS=np.zeros(shape, np.int32),
                    domains_B=np.zeros(arguments.batch, np.int32),
                    valid_B=np.ones(arguments.batch, bool),
                )
            )
        self.steps_done = 0

    def step(self) -> float:
        """One optimizer step; returns the loss (language model plus auxiliary)."""
        batch = self.batches[self.steps_done % len(self.batches)]
        self.steps_done += 1
        return self.stepper(batch, self.steps_done, self.learning_rate).losses["loss"]


def time_gates(
    hidden_size: int, num_experts: int, rounds: int, num_tokens: int = 1024, copies: int = 8
) -> Dict[str, Any]:
    """Forward and backward of both gates, interleaved.

    `copies` inputs go through one compiled graph, so that the call's own cost is shared; the loss
    is the sum of squares of the logits, which needs the forward pass for its gradient.

    Returns:
        grap_ms and dense_ms, lists of milliseconds for one gate on [num_tokens, hidden_size], one
        for each round.
    """
    import mindspore as ms
    from mindspore import Parameter, Tensor, nn, ops

    from pangu_locmoe.moe import gate

    class Loss(nn.Cell):
        def __init__(self, dense: bool) -> None:
            super().__init__()
            self.dense = dense
            generator = np.random.default_rng(1)
            self.w_ED = Parameter(
                Tensor(generator.normal(0, 0.02, (num_experts, hidden_size)).astype(np.float32)),
                name="w",
            )
            self.pooling = gate.GroupedAveragePooling(num_experts)

        def construct(self, *inputs: Any) -> Any:
            total = ops.zeros((), ms.float32)
            for x_TD in inputs:
                logits_TE = gate.dense_logits(x_TD, self.w_ED) if self.dense else self.pooling(x_TD)
                total = total + ops.reduce_sum(logits_TE * logits_TE)
            return total

    class Gradients(nn.Cell):
        def __init__(self, loss: nn.Cell, weights: Any) -> None:
            super().__init__()
            self.gradient = ms.value_and_grad(loss, tuple(range(copies)), weights)

        def construct(self, *inputs: Any) -> Any:
            return self.gradient(*inputs)

    generator = np.random.default_rng(2)
    inputs = tuple(
        Tensor(generator.standard_normal((num_tokens, hidden_size), dtype=np.float32))
        for _ in range(copies)
    )
    dense = Loss(True)
    steps = {
        "grap_ms": ms.jit(Gradients(Loss(False), None)),
        "dense_ms": ms.jit(Gradients(dense, ms.ParameterTuple([dense.w_ED]))),
    }
    times: Dict[str, Any] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            begin = time.perf_counter()
            # Not as one tuple, which would be a constant of the graph.
            step(*inputs)[0].asnumpy()
            # The first two turns compile and warm up.
            if turn > 1:
                times[name].append((time.perf_counter() - begin) * 1e3 / copies)
    return {
        "hidden_size": hidden_size,
        "num_experts": num_experts,
        "num_tokens": num_tokens,
        **times,
    }


def main() -> None:
    """Set up and serve, or time the gates."""
    arguments = parse_arguments()
    if arguments.gate is not None:
        hidden_size, num_experts = arguments.gate
        say("gate " + json.dumps(time_gates(hidden_size, num_experts, arguments.gate_rounds)))
        return
    serve(Trainer(arguments), sys.stdin)


if __name__ == "__main__":
    main()
