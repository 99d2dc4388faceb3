"""How fast text is generated: tokens a second by the window, with keys and values kept and by passes
over whole windows.

Every round takes some tokens of every window on both sides, one after another, so that a ratio is of
numbers of the same seconds; what else the machine does meets both. CPU time, the process's own, is
the steadier measure on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from benchmark.hf import Parser, count

WHOLE = "whole windows"
CACHED = "keys and values kept"


def windows_of(text: str) -> List[int]:
    """Window sizes, ascending."""
    try:
        return sorted({count(word) for word in text.split(",")})
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"must be sizes as 64,512: {error}") from None


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the flags; the defaults are those of docs/performance.md: the shape of
    configs/cpu_base.yaml.
    """
    parser = Parser(str(__doc__).splitlines()[0])
    parser.add_argument("--hidden", type=count, default=256, help="hidden size")
    parser.add_argument("--heads", type=count, default=4, help="attention heads")
    parser.add_argument("--vocabulary", type=count, default=8192, help="vocabulary size")
    parser.add_argument("--seed", type=count, default=1, help="seed of weights, texts and draws")
    parser.add_argument(
        "--windows", type=windows_of, default=[64, 128, 256, 512], help="window sizes, in tokens"
    )
    parser.add_argument("--num-layers", type=count, default=5, help="all layers")
    parser.add_argument("--num-moe-layers", type=int, default=2, help="sparse layers")
    parser.add_argument("--ffn", type=count, default=1024, help="inner width")
    parser.add_argument("--experts", type=count, default=8, help="experts of a sparse layer")
    parser.add_argument("--router", default="locmoe", help="any router of ours")
    parser.add_argument("--rounds", type=count, default=9, help="rounds of all windows and sides")
    parser.add_argument("--tokens", type=count, default=16, help="tokens of a side in a round")
    parser.add_argument("--output", type=Path, help="everything as JSON, raw rounds included")
    return parser.parse_args(argv)


class Side:
    """A text of one window that grows on one side."""

    def __init__(self, arguments: argparse.Namespace, model: Any, config: Any, kind: Any) -> None:
        self.seq_length = config.model.seq_length
        self.vocabulary = config.model.vocab_size
        self.generator = np.random.default_rng(arguments.seed)
        self.logits = kind(model, config, 0, True)
        self.sample = config.sample
        self.window: List[int] = [0]
        self.first_seconds = self.run(1)[0]

    def run(self, tokens: int) -> Tuple[float, float]:
        """Seconds of wall and of CPU time for this many tokens; a full window begins anew."""
        from pangu_locmoe.generate import choose

        begin = time.perf_counter()
        begin_cpu = time.process_time()
        for _ in range(tokens):
            if len(self.window) == self.seq_length:
                self.window = [0]
            logits_BV = self.logits([self.window], np.zeros(1, np.int32))
            self.window.append(choose(logits_BV[0], self.sample, self.generator))
        return time.perf_counter() - begin, time.process_time() - begin_cpu

    def read(self) -> float:
        """Seconds for a prompt that fills the window."""
        text = self.generator.integers(1, self.vocabulary, self.seq_length - 1).tolist()
        self.window = [0, *text]
        begin = time.perf_counter()
        self.logits([self.window], np.zeros(1, np.int32))
        return time.perf_counter() - begin


def build(arguments: argparse.Namespace) -> Dict[int, Dict[str, Side]]:
    """Both sides of each window, compiled."""
    from pangu_locmoe.config import parse_config
    from pangu_locmoe.generate import CachedWindows, WholeWindows
    from pangu_locmoe.model.sigma import PanguSigma

    sides: Dict[int, Dict[str, Side]] = {}
    for window in arguments.windows:
        config = parse_config(
            {
                "model": {
                    "vocab_size": arguments.vocabulary,
                    "hidden_size": arguments.hidden,
                    "num_layers": arguments.num_layers,
                    "num_moe_layers": arguments.num_moe_layers,
                    "num_heads": arguments.heads,
                    "ffn_size": arguments.ffn,
                    "seq_length": window,
                },
                "moe": {
                    "router": arguments.router,
                    "num_experts": arguments.experts,
                    "levels": 1,
                },
                "train": {"seed": arguments.seed},
            }
        )
        model = PanguSigma(config)
        kinds = {WHOLE: WholeWindows, CACHED: CachedWindows}
        sides[window] = {name: Side(arguments, model, config, kinds[name]) for name in kinds}
    return sides


def measure(arguments: argparse.Namespace) -> Dict[str, Any]:
    """All rounds: tokens a second by window and side, and milliseconds for a full prompt."""
    import mindspore as ms

    before = os.getloadavg()
    sides = build(arguments)
    rates: Dict[int, Dict[str, List[float]]] = {
        window: {name: [] for name in pair} for window, pair in sides.items()
    }
    cpu: Dict[int, Dict[str, List[float]]] = {
        window: {name: [] for name in pair} for window, pair in sides.items()
    }
    for pair in sides.values():
        pair[CACHED].read()  # compiles what computes a prompt
    prompts: Dict[int, List[float]] = {window: [] for window in sides}
    for _ in range(arguments.rounds):
        for window, pair in sides.items():
            prompts[window].append(pair[CACHED].read() * 1e3)
            for name, side in pair.items():
                side.window = side.window[:1]
                seconds, cpu_seconds = side.run(arguments.tokens)
                rates[window][name].append(arguments.tokens / seconds)
                cpu[window][name].append(cpu_seconds / arguments.tokens * 1e3)
    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "mindspore": ms.__version__,
            "load_before": before,
            "load_after": os.getloadavg(),
        },
        "seed": arguments.seed,
        "rounds": arguments.rounds,
        "tokens": arguments.tokens,
        "tokens_per_second": rates,
        "cpu_ms_per_token": cpu,
        "prompt_ms": prompts,
        "first_token_seconds": {
            window: {name: side.first_seconds for name, side in pair.items()}
            for window, pair in sides.items()
        },
    }


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median (min-max)."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def report(result: Dict[str, Any]) -> str:
    """The tables of docs/performance.md."""
    machine = result["machine"]
    rates = result["tokens_per_second"]
    cpu = result["cpu_ms_per_token"]
    lines = [
        f"{machine['cores']} cores ({machine['processor']}), MindSpore {machine['mindspore']}, load "
        f"average {machine['load_before'][0]:.1f} before and {machine['load_after'][0]:.1f} after; "
        f"seed {result['seed']}, {result['rounds']} rounds of {result['tokens']} tokens: "
        "median (min-max)",
        "",
        "| window | tokens/s, whole windows | tokens/s, kept | ratio in a round | CPU ms of a token, "
        "whole windows | CPU ms, kept | prompt of the whole window, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for window, pair in rates.items():
        ratios = [kept / whole for kept, whole in zip(pair[CACHED], pair[WHOLE])]
        lines.append(
            f"| {window} | {spread(pair[WHOLE], 1)} | {spread(pair[CACHED])} | "
            f"{spread(ratios, 1)} | {spread(cpu[window][WHOLE])} | {spread(cpu[window][CACHED], 1)} | "
            f"{spread(result['prompt_ms'][window])} |"
        )
    short, long = min(rates), max(rates)
    slower = [a / b for a, b in zip(rates[short][CACHED], rates[long][CACHED])]
    longer = [a / b for a, b in zip(cpu[long][CACHED], cpu[short][CACHED])]
    lines += [
        "",
        f"kept, a token at {long} over one at {short}: time {spread(slower, 2)}, "
        f"CPU time {spread(longer, 2)}",
    ]
    return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments()
    result = measure(arguments)
    print(report(result))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
