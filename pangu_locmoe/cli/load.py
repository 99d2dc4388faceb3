"""The verbs of `pangu-locmoe load`: parse, call, print.

None of them needs MindSpore, but for the LSTM.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional

from pangu_locmoe.cli.flags import Verbs, add_verb
from pangu_locmoe.errors import DataError
from pangu_locmoe.files import json_text

if TYPE_CHECKING:
    from pangu_locmoe.expert_load.trace import Trace


def _add_import(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "import",
        _import,
        ("bring a routing trace, a table of loads or a serving engine's dump of them into a trace"),
    )
    verb.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="one, or those that belong together: of several ranks or moments",
    )
    verb.add_argument(
        "--format",
        choices=("megatron", "csv", "sglang", "sglang-csv", "vllm", "vllm-ascend", "huggingface"),
        help="of the files (told by them)",
    )
    verb.add_argument("--output", type=Path, required=True, help="the trace, an .npz")
    verb.add_argument(
        "--num-experts", type=int, help="experts of each layer (the largest index + 1)"
    )
    verb.add_argument(
        "--ranks-per-node", type=int, default=1, help="consecutive ranks that are one node (1)"
    )
    verb.add_argument(
        "--top-k", type=int, metavar="K", help="huggingface: experts that a token has"
    )
    verb.add_argument(
        "--expert-map",
        type=Path,
        metavar="expert_map.json",
        help="vllm-ascend: where experts were (in order)",
    )


def _add_states(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "states",
        _states,
        (
            "tell from which step on the loads are stable, layer by layer, or that the trace "
            "is too short to tell"
        ),
    )
    _add_trace(verb)
    verb.add_argument("--window", type=int, help="rows that a verdict looks back")
    verb.add_argument("--plot", type=Path, metavar="FILE.svg", help="also plot shares and states")
    verb.add_argument("--json", action="store_true", help="print JSON")


def _add_forecast(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "forecast",
        _forecast,
        "forecast the shares of coming steps; where the trace covers them, also the errors",
    )
    _add_trace(verb)
    verb.add_argument(
        "--origin",
        type=int,
        metavar="STEP",
        help="first step to forecast; only rows before it are used (after the last row)",
    )
    verb.add_argument("--horizon", type=int, required=True, metavar="STEPS")
    verb.add_argument(
        "--method",
        default="auto",
        metavar="NAME",
        help=(
            "auto, last, drift, window_mean, sw_avg, ses, theta, linear_trend, log_trend, "
            "combination, arima or lstm (auto)"
        ),
    )
    verb.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the method, for example window=50 or order=5,1,5; repeatable",
    )
    verb.add_argument(
        "--train-on", type=Path, metavar="TRACE", help="lstm: learn from another run's trace"
    )
    verb.add_argument(
        "--output",
        type=Path,
        metavar="F.npz",
        help="write step [rows] and share [rows, layers, experts]",
    )
    verb.add_argument("--json", action="store_true", help="print JSON")


def _add_place(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "place",
        _place,
        (
            "place experts on ranks by the load forecast, or by what there is of a trace too "
            "short to tell its state"
        ),
    )
    _add_trace(verb)
    verb.add_argument("--nodes", type=int, required=True)
    verb.add_argument("--ranks-per-node", type=int, required=True)
    verb.add_argument(
        "--policy",
        choices=("locality", "eplb"),
        default="locality",
        help="modelled step time, or balance alone (locality)",
    )
    verb.add_argument("--groups", type=int, help="expert groups, each of which stays within a node")
    verb.add_argument(
        "--copies",
        "--replicas",
        type=int,
        default=0,
        metavar="K",
        help="slots of a layer beyond one for each expert (0)",
    )
    verb.add_argument(
        "--origin", type=int, metavar="STEP", help="plan from the rows before this step (all)"
    )
    verb.add_argument(
        "--horizon",
        type=int,
        default=1000,
        metavar="STEPS",
        help="for how long the plan will hold (1000)",
    )
    verb.add_argument(
        "--current",
        type=Path,
        metavar="PLAN",
        help="the placement there is, in any format of --format (experts in order)",
    )
    verb.add_argument(
        "--while-transient",
        action="store_true",
        help="also move experts of layers whose load is not yet stable",
    )
    verb.add_argument("--hidden-size", type=int, help="D of the model (768)")
    verb.add_argument("--ffn-size", type=int, help="F of an expert (3072)")
    verb.add_argument(
        "--flops-per-second", type=float, help="what one rank sustains on its experts (1e14)"
    )
    verb.add_argument(
        "--link-bytes-per-second", type=float, help="of one node's link, each direction (1.25e10)"
    )
    verb.add_argument(
        "--format",
        choices=("pangu-locmoe", "vllm-ascend", "sglang", "eplb"),
        default="pangu-locmoe",
        help="of the output; all but the first hold the placement alone (pangu-locmoe)",
    )
    verb.add_argument("--output", type=Path, required=True, metavar="PLAN")
    verb.add_argument("--json", action="store_true", help="print JSON")


def _add_report(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "report",
        _report,
        "one page: shares, states, errors of the forecasts by method, horizon and state",
    )
    _add_trace(verb)
    verb.add_argument("--output", type=Path, help="the page (load-report.html beside the trace)")


def _add_trace(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("trace", type=Path, metavar="TRACE", help="a run directory, or its load.npz")


def _file(path: Path) -> Path:
    return path / "load.npz" if path.is_dir() else path


def read(path: Path) -> Trace:
    """The trace of a run directory, or a trace file. Raises DataError."""
    from pangu_locmoe.expert_load.trace import read_trace

    return read_trace(path)


def _import(options: argparse.Namespace) -> int:
    from pangu_locmoe.expert_load.importing import import_trace
    from pangu_locmoe.expert_load.trace import write_trace

    trace = import_trace(
        options.files,
        options.num_experts,
        options.ranks_per_node,
        options.format,
        options.top_k,
        options.expert_map,
    )
    try:
        write_trace(options.output, trace)
    except OSError as error:
        raise DataError(f"{options.output}: cannot be written: {error.strerror or error}") from None
    rows, layers, experts = trace.load_WLE.shape
    print(
        f"{options.output}: {rows} rows, steps {trace.step_W[0]} to {trace.step_W[-1]}, "
        f"{layers} layers, {experts} experts"
    )
    return 0


def _states(options: argparse.Namespace) -> int:
    from pangu_locmoe.expert_load.state import states

    trace = read(options.trace)
    try:
        found = states(trace) if options.window is None else states(trace, options.window)
    except ValueError as error:
        raise DataError(f"--window {options.window}: {error}") from None
    print(json_text(found.to_dict()) if options.json else found.format())
    if options.plot is not None:
        from pangu_locmoe.report.expert_load.plots import plot_states

        try:
            plot_states(trace, found, options.plot)
        except (OSError, ValueError) as error:
            raise DataError(f"--plot {options.plot}: cannot be written: {error}") from None
    return 0


def _forecast(options: argparse.Namespace) -> int:
    from pangu_locmoe.expert_load.forecast import forecast, save_forecast
    from pangu_locmoe.expert_load.forecast.score import errors

    trace = read(options.trace)
    chosen = _method_options(options)
    origin = int(trace.step_W[-1]) + 1 if options.origin is None else options.origin
    made = forecast(trace, origin, options.horizon, options.method, **chosen)
    if options.output is not None:
        save_forecast(options.output, made)
    found = {**made.to_dict(), "errors": errors(made, trace)}
    print(json_text(found) if options.json else _format_forecast(found))
    return 0


def _method_options(options: argparse.Namespace) -> Dict[str, Any]:
    chosen: Dict[str, Any] = {}
    for text in options.option:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise DataError(f"--option {text}: must be NAME=VALUE")
        chosen[name] = _value(value)
    if options.train_on is not None:
        chosen["train_on"] = read(options.train_on)
    if options.method == "arima":
        chosen.setdefault("progress", True)
    return chosen


def _value(text: str) -> Any:
    """A number, a list of numbers with commas, or text."""
    parts: List[Any] = []
    for part in text.split(","):
        try:
            parts.append(int(part))
        except ValueError:
            try:
                parts.append(float(part))
            except ValueError:
                return text
    return parts if len(parts) > 1 else parts[0]


def _format_forecast(found: Dict[str, Any]) -> str:
    lines = [
        (
            f"{found['method']}: {found['rows']} rows, steps {found['first_step']} to "
            f"{found['last_step']}"
        )
    ]
    if found["chosen"]:
        lines.append(
            "made of "
            + ", ".join(f"{part['method']} {part['weight']:.0%}" for part in found["chosen"])
        )
    lines += [f"{key}: {value}" for key, value in found["notes"].items()]
    pooled = found["errors"]["pooled"]
    if pooled is None:
        return "\n".join([*lines, "the trace does not cover these steps: no errors"])
    for name, value in pooled.items():
        lines.append(f"  {name:<17} {'-' if value is None else f'{value:.4g}'}")
    return "\n".join(lines)


def _place(options: argparse.Namespace) -> int:
    from pangu_locmoe.expert_load.forecast import mean_share
    from pangu_locmoe.expert_load.placement import (
        Costs,
        load_placement,
        place_trace,
        save_placement,
    )
    from pangu_locmoe.expert_load.state import states

    given = {
        name: getattr(options, name)
        for name in ("hidden_size", "ffn_size", "flops_per_second", "link_bytes_per_second")
    }
    plan = place_trace(
        read(options.trace),
        options.nodes,
        options.ranks_per_node,
        Costs.of_model(
            horizon=options.horizon,
            **{name: value for name, value in given.items() if value is not None},
        ),
        mean_share,
        options.policy,
        options.groups,
        options.copies,
        options.origin,
        options.horizon,
        None if options.current is None else load_placement(options.current).expert_of_slot_LP,
        None if options.while_transient else lambda past: states(past).told,
        one_copy_per_rank=options.format == "vllm-ascend",
    )
    save_placement(plan, options.output, options.format)
    print(json_text(plan.to_dict()) if options.json else plan.format())
    return 0


def _report(options: argparse.Namespace) -> int:
    from pangu_locmoe.report.expert_load.page import build_load_report

    file = _file(options.trace)
    output: Optional[Path] = options.output
    print(build_load_report(file, output or file.with_name("load-report.html")))
    return 0


VERBS = (_add_import, _add_states, _add_forecast, _add_place, _add_report)
