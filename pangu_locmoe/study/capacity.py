"""Loss and time against the capacity factor, who is dropped first, and where LocMoE's floor on the capacity lands.

All models are evaluated without drops; the factor is that of training. The knee is the smallest factor whose validation loss is
within 1% of the loss at the largest one. A floor is a number of tokens; times experts / tokens of a step it is a capacity factor.

Letters: T tokens of a step, E experts, L sparse layers, C slots of an expert.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from pangu_locmoe.moe.capacity import capacity_bounds, cosine_statistic
from pangu_locmoe.moe.routers import ROUTERS
from pangu_locmoe.study import verdict
from pangu_locmoe.study.experiment import Case, Claim, Experiment, Measured
from pangu_locmoe.study.training import CONFIG, Record, routers, trained
from pangu_locmoe.train.callbacks import Row
from pangu_locmoe.train.step import StepResult

FACTORS = (2.0, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25)
TOLERANCE = 0.01  # of the loss at the largest factor
STATISTICS = ("min", "median", "max")
FORMS = ("exact", "erfc", "exponential")
USUAL = 1.25

Curve = Dict[float, List[Any]]
"""results by capacity factor, in the order of the seeds"""


class RecordDelta(Record):
    """Also delta, each layer's statistics of the cosines between tokens and their gates, every so many steps."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.delta: List[Dict[str, Any]] = []

    def on_step(self, step: int, result: StepResult, row: Row) -> None:
        super().on_step(step, result, row)
        if (step == 1 or step % self.every == 0) and result.cosine_LT.any():
            cosines_LT = np.clip(result.cosine_LT, -1, 1)
            self.delta.append({"step": step, **{name: [cosine_statistic(cosines_T, name) for cosines_T in cosines_LT] for name in STATISTICS}})


def cases(quick: bool) -> List[Case]:
    """Every router at every factor. Dropping by position is for the factors that drop, with one seed, to keep the whole under an hour.

    A router whose experts choose by affinity has no other order.
    """
    changes = ["train.steps=60", "evaluation.every=60"] if quick else ["train.steps=500", "evaluation.every=100"]
    made = []
    for seed in (1,) if quick else (1, 2):
        for router in routers():
            for order in ("affinity", "position"):
                if order == "position" and (quick or seed > 1 or not ROUTERS[router].has_gate or ROUTERS[router].has_token_choice):
                    continue
                for factor in (2.0, 1.0, 0.5) if quick else FACTORS if order == "affinity" else FACTORS[3:]:
                    values = [*changes, f"moe.capacity.factor={factor}", f"moe.capacity.drop_order={order}"]
                    made.append({"router": router, "seed": seed, "order": order, "factor": factor, "config": CONFIG, "set": values})
    return made


def measure(case: Case) -> Any:
    record = RecordDelta(25)
    trainer = trained(case, record)
    model, half = trainer.config.model, record.rows[len(record.rows) // 2 :]
    return {
        "validation": record.validation,
        "step_seconds": statistics.median(row["step_seconds"] for row in half),
        "dropped_fraction": statistics.mean(row["dropped_fraction"] for row in half),
        "capacity": record.rows[-1]["capacity"],
        "tokens": trainer.config.micro_batch * model.seq_length,
        "experts": trainer.config.moe.num_experts,
        "hidden": model.hidden_size,
        "delta": record.delta,
    }


def curve(measured: List[Measured], router: str, order: str = "affinity") -> Curve:
    """A router's results by factor, the largest first."""
    found: Curve = {}
    for row in sorted(measured, key=lambda row: (-row["case"]["factor"], row["case"]["seed"])):
        if (row["case"]["router"], row["case"]["order"]) == (router, order):
            found.setdefault(row["case"]["factor"], []).append(row["result"])
    return found


def losses(results: Curve) -> Dict[float, float]:
    """Final validation loss by factor, mean over the seeds."""
    return {factor: statistics.mean(result["validation"][-1][1] for result in group) for factor, group in results.items()}


def knee(loss: Dict[float, float], tolerance: float = TOLERANCE) -> float:
    """The smallest factor down to which every loss is within `tolerance` of the loss at the largest factor."""
    factors = sorted(loss, reverse=True)
    found = factors[0]
    for factor in factors:
        if loss[factor] > loss[factors[0]] * (1 + tolerance):
            break
        found = factor
    return found


def floors(result: Any) -> Dict[Tuple[str, str], float]:
    """The theorem's three forms as capacity factors, by statistic and form: the mean over layers of the last measured delta."""
    found = {}
    last = result["delta"][-1]
    for statistic in STATISTICS:
        bounds = [capacity_bounds(result["hidden"], result["experts"], delta) for delta in last[statistic]]
        for form in FORMS:
            found[statistic, form] = statistics.mean(getattr(bound, form) for bound in bounds) * result["experts"] / result["tokens"]
    return found


def claims(measured: List[Measured]) -> List[Claim]:
    curves = {router: curve(measured, router) for router in dict.fromkeys(row["case"]["router"] for row in measured)}
    gated = {router: results for router, results in curves.items() if any(result["delta"] for result in results.get(USUAL, results[max(results)]))}
    steps = measured[0]["result"]["validation"][-1][0]
    how = f"{CONFIG}, {steps} steps, evaluated without drops"
    seeds = verdict.count(len({row["case"]["seed"] for row in measured}), "seed")
    return [
        _knees(curves, seeds, how),
        _times(curves, seeds, how),
        *_orders(measured, gated, how),
        *_floor(gated, seeds, how),
        *_plus(curves, seeds, how),
    ]


def _knees(curves: Dict[str, Curve], seeds: str, how: str) -> Claim:
    knees = {router: knee(losses(results)) for router, results in curves.items()}
    told = "; ".join(f"{router} {knees[router]:g} (loss {losses(results)[max(results)]:.3f} at {max(results):g}, {losses(results)[min(results)]:.3f} at {min(results):g})" for router, results in curves.items())
    low = [USUAL - value for value in knees.values()]
    return Claim(
        "A capacity below the usual 1.1 to 1.25 loses nothing", "a low capacity suffices for alike tokens", f"knee (loss within {TOLERANCE:.0%}): {told}", seeds, how,
        *verdict.positive(low, f"the knee is below {USUAL:g}, router by router"),
    )  # fmt: skip


def _times(curves: Dict[str, Curve], seeds: str, how: str) -> Claim:
    def seconds(results: Curve, factor: float) -> float:
        return statistics.mean(result["step_seconds"] for result in results[factor])

    saved = [1 - seconds(results, min(results)) / seconds(results, max(results)) for results in curves.values()]
    return Claim(
        "A lower capacity makes a step shorter", "yes", f"from the largest factor to the smallest {verdict.spread(saved, '.0%')} shorter", seeds, f"{how}; median of the second half",
        *verdict.positive([value - 0.02 for value in saved], "the step is at least 2% shorter, router by router"),
    )  # fmt: skip


def _orders(measured: List[Measured], gated: Dict[str, Curve], how: str) -> List[Claim]:
    gains = {}
    for router in gated:
        first, last = losses(_of_seed_one(measured, router, "affinity")), losses(_of_seed_one(measured, router, "position"))
        for factor in sorted({*first} & {*last}):
            if factor <= 1.0:
                gains[router, factor] = last[factor] - first[factor]
    if not gains:
        return []
    told = "; ".join(f"{router} at {factor:g} {gain:+.3f}" for (router, factor), gain in gains.items())
    rule = verdict.positive(list(gains.values()), "affinity order has the lower loss, router and factor")
    return [Claim("Dropping the tokens of least affinity is better than dropping the last", "LocMoE+ keeps the highest affinity", f"loss by position less loss by affinity: {told}", "1 seed", how, *rule)]


def _of_seed_one(measured: List[Measured], router: str, order: str) -> Curve:
    return curve([row for row in measured if row["case"]["seed"] == 1], router, order)


def _floor(gated: Dict[str, Curve], seeds: str, how: str) -> List[Claim]:
    made = []
    for router, results in gated.items():
        least = knee(losses(results))
        groups = [floors(result) for result in results.get(USUAL, results[max(results)]) if result["delta"]]
        mean = {key: statistics.mean(group[key] for group in groups) for key in groups[0]}
        told = "; ".join(f"{statistic}: " + ", ".join(f"{form} {_short(mean[statistic, form])}" for form in FORMS) for statistic in STATISTICS)
        rule = f"{router}'s knee is within a factor of 2 of the exact form at the median cosine, and of the exponential form at the largest"
        near = [_near(mean["median", "exact"], least), _near(mean["max", "exponential"], least)]
        made.append(
            Claim(f"The theorem's floor tells the capacity that is needed ({router})", "used to set the capacity", f"knee at factor {least:g}; floors as factors, by statistic of the cosines, {told}", seeds, how, *verdict.all_of(near, rule))
        )
    return made


def _near(floor: float, factor: float) -> bool:
    return factor / 2 <= floor <= factor * 2


def _short(value: float) -> str:
    return f"{value:.3g}"


def _plus(curves: Dict[str, Curve], seeds: str, how: str) -> List[Claim]:
    """LocMoE+ against LocMoE at the usual capacity: the smallest factor with no higher a loss, and its time."""
    names = ("LocMoE+ is 2.9 to 13.3% faster than LocMoE", "2.9 to 13.3%"), ("LocMoE+ needs 60% fewer tokens per expert", "60% and more")
    plus, ours = curves.get("locmoe_plus"), curves.get("locmoe")
    if plus is None or ours is None or not ({USUAL, 1.0} & {*ours}):
        return [Claim(claim, paper, "–", "–", "–", *verdict.cannot("this version has no router locmoe_plus, or it was not measured")) for claim, paper in names]
    usual = USUAL if USUAL in ours else 1.0
    wanted = losses(ours)[usual] * (1 + TOLERANCE)
    enough = [factor for factor, loss in losses(plus).items() if loss <= wanted]
    factor: Optional[float] = min(enough) if enough else None
    if factor is None:
        told = f"at no factor is its loss within {TOLERANCE:.0%} of locmoe's at {usual:g}"
        return [Claim(claim, paper, told, seeds, how, *verdict.at_least([-1.0], 0.0, ".1%")) for claim, paper in names]
    pairs = zip(plus[factor], ours[usual])
    times = [1 - one["step_seconds"] / other["step_seconds"] for one, other in pairs]
    fewer = [1 - one["capacity"] / other["capacity"] for one, other in zip(plus[factor], ours[usual])]
    alike = min(other for other, loss in losses(ours).items() if loss <= wanted)
    told = f"at factor {factor:g}, whose loss is within {TOLERANCE:.0%} of locmoe's at {usual:g} (so is locmoe's own at {alike:g})"
    fair = [1 - one["capacity"] / other["capacity"] for one, other in zip(plus[factor], ours[alike])]
    return [
        Claim(*names[0], f"{verdict.spread(times, '.1%')} {told}", seeds, how, *verdict.at_least(times, 0.029, ".1%")),
        Claim(*names[1], f"{verdict.spread(fewer, '.0%')} {told}; {verdict.spread(fair, '.0%')} against that", seeds, how, *verdict.at_least([min(pair) for pair in zip(fewer, fair)], 0.6, ".0%")),
    ]


def draw(measured: List[Measured], path: Path) -> None:
    """Loss and time against the factor, and delta over the steps."""
    from pangu_locmoe.study import charts

    lines = charts.Lines(3)
    for router in dict.fromkeys(row["case"]["router"] for row in measured):
        for order, style in (("affinity", "o-"), ("position", "x--")):
            results = curve(measured, router, order)
            if results:
                loss = losses(results)
                lines.add(0, router, list(loss), list(loss.values()), style, router if order == "affinity" else f"{router}, by position")
        results = curve(measured, router)
        lines.add(1, router, list(results), [1e3 * statistics.mean(r["step_seconds"] for r in group) for group in results.values()], "o-")
        first = results.get(USUAL, results[max(results)])[0]
        if first["delta"]:
            _delta(lines, router, first["delta"])
            lines.mark(0, min(floors(first)["median", "exact"], max(results)), router, f"floor of {router}")
    lines.save(path, [("capacity factor in training", "validation loss, no drops"), ("capacity factor in training", "milliseconds a step"), ("steps", "median cosine of token and gate, by layer")])


def _delta(lines: Any, router: str, delta: Sequence[Dict[str, Any]]) -> None:
    for layer, style in zip(range(len(delta[0]["median"])), ("-", "--", "-.", ":") * 8):
        lines.add(2, router, [point["step"] for point in delta], [point["median"][layer] for point in delta], style, f"{router}, layer {layer}")


EXPERIMENT = Experiment(
    "capacity", cases, measure, claims, draw,
    "Loss and time against the capacity factor (dotted: the exact floor at the median cosine, cut off at the largest factor), and delta while training",
)  # fmt: skip
