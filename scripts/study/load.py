"""Expert load over time: states and forecasts of the recorded traces (arXiv 2404.16914).

Needs no MindSpore but for the LSTM.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, Dict, List

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.forecast import forecast
from pangu_locmoe.expert_load.forecast.score import errors
from pangu_locmoe.expert_load.state import states
from pangu_locmoe.expert_load.trace import read_trace
from study import tokens, verdict
from study.experiment import Case, Claim, Experiment, Measured

TRACES = Path("tests/data/traces")
ORDER = ("sw_avg", "arima", "lstm")
PAPER = {
    "sw_avg": 0.013,
    "arima": 0.014,
    "lstm": 0.10,
}  # mean error over 1,000 stable steps, the 350M model
ORIGINS = {1000: 1400, 2000: 400}
"""first forecast step by horizon: the latest round one that a trace of 2,400 steps covers"""
EARLY = (60, 120)
LATE = (2200, 2400)


def traces() -> List[str]:
    return sorted(path.stem for path in TRACES.glob("*.npz"))


def state_cases(quick: bool) -> List[Case]:
    return [{"trace": name} for name in traces()]


def measure_states(case: Case) -> Any:
    trace = read_trace(TRACES / f"{case['trace']}.npz")
    found = states(trace)
    return {
        "stable_from": found.layers_stable_from,
        "steps": int(trace.step_W[-1]),
        "unused": {
            f"{first}-{end}": tokens.unused_fraction(trace.between(first, end).load_WLE)
            for first, end in (EARLY, LATE)
        },
    }


def state_claims(measured: List[Measured]) -> List[Claim]:
    results: Dict[str, Any] = {row["case"]["trace"]: row["result"] for row in measured}
    told = "; ".join(
        f"{name}: {', '.join(str(step) for step in result['stable_from'])}"
        for name, result in results.items()
    )
    settled = [
        all(step is not None for step in result["stable_from"]) for result in results.values()
    ]
    deeper = [
        result["stable_from"][0] - result["stable_from"][-1]
        for result in results.values()
        if None not in result["stable_from"]
    ]
    how = (
        f"scripts/record_traces.sh, {next(iter(results.values()))['steps']} steps, the rule of "
        "docs/load.md"
    )
    unused = {name: list(result["unused"].values()) for name, result in results.items()}
    return [
        Claim(
            "Load is transient first and stable later",
            "yes",
            f"stable from, by layer: {told}",
            verdict.count(len(results), "trace"),
            how,
            *verdict.all_of(settled, "every layer of every trace becomes stable"),
        ),
        Claim(
            "Deeper layers settle earlier",
            "(our question)",
            f"first layer's step less the last's: {', '.join(map(str, deeper))}",
            verdict.count(len(deeper), "trace"),
            how,
            *verdict.positive(
                [float(d) for d in deeper], "the last layer settles before the first"
            ),
        ),
        _unused(unused, how),
    ]


def _unused(unused: Dict[str, List[float]], how: str) -> Claim:
    told = "; ".join(f"{name} {early:.0%}, {late:.0%}" for name, (early, late) in unused.items())
    locmoe = {
        name.partition("-")[2]: values[1]
        for name, values in unused.items()
        if name.startswith("locmoe-")
    }
    more = [
        values[1] - locmoe[name.partition("-")[2]]
        for name, values in unused.items()
        if name.startswith("switch-") and name.partition("-")[2] in locmoe
    ]
    return Claim(
        "Switch leaves 40% of its experts nearly unused, LocMoE is even: over a long run",
        "about 40%; even",
        (
            f"under {tokens.HARDLY:.0%} of an even share, steps {EARLY[0]} to {EARLY[1]}, and "
            f"{LATE[0]} to {LATE[1]}: {told}"
        ),
        verdict.count(len(unused), "trace"),
        how,
        *verdict.at_least(more, 0.3, ".0%"),
    )


def forecast_cases(quick: bool) -> List[Case]:
    names = traces()[:1] if quick else traces()
    methods = ORDER[:1] if quick else ORDER
    return [
        {"trace": name, "method": method, "horizon": horizon, "origin": origin}
        for name in names
        for method in methods
        for horizon, origin in ORIGINS.items()
    ]


def measure_forecast(case: Case) -> Any:
    """Pooled errors; `missing` says which library is not installed."""
    trace = read_trace(TRACES / f"{case['trace']}.npz")
    began = states(trace).to_dict()["stable_from"]
    state = "stable" if began is not None and began <= case["origin"] else "transient"
    try:
        found = forecast(trace, case["origin"], case["horizon"], case["method"])
    except DataError as error:
        return {"state": state, "missing": str(error)}
    return {"state": state, **errors(found, trace)["pooled"]}


def forecast_claims(measured: List[Measured]) -> List[Claim]:
    made = []
    for horizon, origin in ORIGINS.items():
        rows = [
            row
            for row in measured
            if row["case"]["horizon"] == horizon and "missing" not in row["result"]
        ]
        stable = _by_method([row for row in rows if row["result"]["state"] == "stable"])
        transient = _by_method([row for row in rows if row["result"]["state"] == "transient"])
        told = (
            "; ".join(
                f"{state} {method} {verdict.spread(found[method], '.1%')}"
                for state, found in (("stable", stable), ("transient", transient))
                for method in ORDER
                if method in found
            )
            or "–"
        )
        how = f"recorded traces, origin {origin}, WAPE of the mean over the horizon"
        names = verdict.count(len({row["case"]["trace"] for row in rows}), "trace")
        if horizon == 1000:
            missing = [method for method in ORDER if method not in stable]
            reached = [max(stable[method]) <= PAPER[method] for method in ORDER if method in stable]
            rule = (
                verdict.cannot("no trace is stable at that origin")
                if not stable
                else verdict.all_of(
                    [*reached, *[False] * len(missing)],
                    "every method is within the paper's figures for its 350M model",
                )
            )
            made.append(
                Claim(
                    "Errors over 1,000 stable steps",
                    "125M: SW_Avg 0.25%, ARIMA 0.5%, LSTM below 1%; 350M: 1.3%, 1.4%, below 10%",
                    told,
                    names,
                    how,
                    *rule,
                )
            )
            made.append(_order(stable, names, how))
        else:
            what = (
                "no trace is stable 2,000 steps before its end: what is shown begins in the "
                "transient state"
            )
            made.append(
                Claim(
                    "Errors over 2,000 stable steps",
                    "350M: SW_Avg 1.8%",
                    told,
                    names,
                    how,
                    *(
                        verdict.at_most(stable["sw_avg"], 0.018, 0.05, ".1%")
                        if "sw_avg" in stable
                        else verdict.cannot(what)
                    ),
                )
            )
    return made


def _by_method(rows: List[Measured]) -> Dict[str, List[float]]:
    found: Dict[str, List[float]] = {}
    for row in rows:
        found.setdefault(row["case"]["method"], []).append(row["result"]["mean_wape"])
    return found


def _order(stable: Dict[str, List[float]], names: str, how: str) -> Claim:
    means = {method: statistics.mean(values) for method, values in stable.items()}
    told = " < ".join(
        f"{method} {means[method]:.1%}" for method in sorted(means, key=means.__getitem__)
    )
    rule = "SW_Avg's mean error is below ARIMA's, and ARIMA's below the LSTM's"
    if len(means) < len(ORDER):
        return Claim(
            "SW_Avg is best, then ARIMA, then the LSTM",
            "yes",
            told,
            names,
            how,
            *verdict.cannot("not all three methods were measured in the stable state"),
        )
    return Claim(
        "SW_Avg is best, then ARIMA, then the LSTM",
        "yes",
        told,
        names,
        how,
        *verdict.all_of([means["sw_avg"] < means["arima"], means["arima"] < means["lstm"]], rule),
    )


STATES = Experiment("states", state_cases, measure_states, state_claims)
FORECASTS = Experiment("forecasts", forecast_cases, measure_forecast, forecast_claims)
