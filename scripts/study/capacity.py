"""Loss and time against the capacity factor, who is dropped first, and where LocMoE's floor on the
capacity lands.

All models are evaluated without drops; the factor is that of training. The knee is the smallest
factor down to which the validation loss stays within a tolerance of the loss at the largest one:
1%, or the mean range of its seeds where that is wider. Times are of other cases than losses, in
which all take turns (step_times.py). A floor is a number of tokens; times experts / tokens of a
step it is a capacity factor.

Letters: T tokens of a step, E experts, L sparse layers, C slots of an expert.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from pangu_locmoe.moe.capacity import capacity_bounds, cosine_statistic
from pangu_locmoe.moe.routers import ROUTERS
from pangu_locmoe.train.callbacks import Row
from pangu_locmoe.train.step import StepResult
from study import step_times, verdict
from study.documents import UNKNOWN, on_other_documents
from study.experiment import Case, Claim, Experiment, Measured
from study.step_times import Times, by_run, shorter
from study.training import CONFIG, Record, routers, trained

FACTORS = (2.0, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25)
TOLERANCE = 0.01  # of the loss at the largest factor, at least
STATISTICS = ("min", "median", "max")
FORMS = ("exact", "erfc", "exponential")
USUAL = 1.25

Curve = Dict[float, List[Any]]
"""results by capacity factor, in the order of the seeds"""


class RecordDelta(Record):
    """Also delta, each layer's statistics of the cosines between tokens and their gates, every
    so many steps.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.delta: List[Dict[str, Any]] = []

    def on_step(self, step: int, result: StepResult, row: Row) -> None:
        super().on_step(step, result, row)
        if (step == 1 or step % self.every == 0) and result.cosine_LT.any():
            cosines_LT = np.clip(result.cosine_LT, -1, 1)
            self.delta.append(
                {
                    "step": step,
                    **{
                        name: [cosine_statistic(cosines_T, name) for cosines_T in cosines_LT]
                        for name in STATISTICS
                    },
                }
            )


def cases(quick: bool) -> List[Case]:
    """The times of all, and the losses of every router at every factor; dropping by position at the
    factors that drop.

    A router whose experts choose by affinity has no other order.
    """
    changes = (
        ["train.steps=60", "evaluation.every=60"]
        if quick
        else ["train.steps=500", "evaluation.every=100"]
    )
    seeds, factors = ((1,), (2.0, 1.0, 0.5)) if quick else ((1, 2), FACTORS)
    made: List[Case] = [
        {
            "rounds": 10 if quick else 60,
            "seed": seed,
            "routers": routers(),
            "factors": [*factors],
            "config": CONFIG,
        }
        for seed in seeds
    ]
    for seed in seeds:
        for router in routers():
            for order in ("affinity", "position"):
                if order == "position" and (
                    quick
                    or not ROUTERS[router].traits.has_gate
                    or ROUTERS[router].traits.has_token_choice
                ):
                    continue
                for factor in factors if order == "affinity" else factors[3:]:
                    values = [
                        *changes,
                        f"moe.capacity.factor={factor}",
                        f"moe.capacity.drop_order={order}",
                    ]
                    made.append(
                        {
                            "router": router,
                            "seed": seed,
                            "order": order,
                            "factor": factor,
                            "config": CONFIG,
                            "set": values,
                        }
                    )
    return made


def measure(case: Case) -> Any:
    if "rounds" in case:
        return step_times.measure(case)
    record = RecordDelta(25)
    trainer = trained(case, record)
    model = trainer.config.model
    half = record.rows[len(record.rows) // 2 :]
    return {
        "validation": record.validation,
        "blocks": trainer.evaluator.blocks,
        "dropped_fraction": statistics.mean(row["dropped_fraction"] for row in half),
        "capacity": record.rows[-1]["capacity"],
        "tokens": trainer.config.micro_batch * model.seq_length,
        "experts": trainer.config.moe.num_experts,
        "hidden": model.hidden_size,
        "delta": record.delta,
    }


def _parts(measured: List[Measured]) -> Tuple[List[Measured], List[Times]]:
    """The cases with losses, and the times of the others."""
    return [row for row in measured if "rounds" not in row["case"]], by_run(
        [row for row in measured if "rounds" in row["case"]]
    )


def curve(measured: List[Measured], router: str, order: str = "affinity") -> Curve:
    """A router's results by factor, the largest first."""
    found: Curve = {}
    for row in sorted(measured, key=lambda row: (-row["case"]["factor"], row["case"]["seed"])):
        if (row["case"]["router"], row["case"]["order"]) == (router, order):
            found.setdefault(row["case"]["factor"], []).append(row["result"])
    return found


def final_losses(group: Sequence[Any]) -> List[float]:
    """Final validation loss of each seed."""
    return [result["validation"][-1][1] for result in group]


def losses(results: Curve) -> Dict[float, float]:
    """Final validation loss by factor, mean over the seeds."""
    return {factor: statistics.mean(final_losses(group)) for factor, group in results.items()}


def tolerance(results: Curve) -> float:
    """How far a loss may be above that at the largest factor and still count as the same, as a
    share of it.
    """
    groups = [final_losses(group) for group in results.values()]
    return max(
        TOLERANCE,
        statistics.mean((max(group) - min(group)) / statistics.mean(group) for group in groups),
    )


def knee(results: Curve) -> float:
    """The smallest factor down to which every loss is the same as at the largest factor."""
    loss = losses(results)
    allowed = tolerance(results)
    factors = sorted(loss, reverse=True)
    found = factors[0]
    for factor in factors:
        if loss[factor] > loss[factors[0]] * (1 + allowed):
            break
        found = factor
    return found


def floors(result: Any) -> Dict[Tuple[str, str], float]:
    """The theorem's three forms as capacity factors, by statistic and form: the mean over layers
    of the last measured delta.
    """
    found = {}
    last = result["delta"][-1]
    for statistic in STATISTICS:
        bounds = [
            capacity_bounds(result["hidden"], result["experts"], delta) for delta in last[statistic]
        ]
        for form in FORMS:
            found[statistic, form] = (
                statistics.mean(getattr(bound, form) for bound in bounds)
                * result["experts"]
                / result["tokens"]
            )
    return found


def claims(measured: List[Measured]) -> List[Claim]:
    rows, times = _parts(measured)
    curves = {
        router: curve(rows, router)
        for router in dict.fromkeys(row["case"]["router"] for row in rows)
    }
    made = [_faster(times)] if times else []
    if not curves:
        return made
    gated = {
        router: results
        for router, results in curves.items()
        if any(result["delta"] for result in results.get(USUAL, results[max(results)]))
    }
    how = f"{CONFIG}, {rows[0]['result']['validation'][-1][0]} steps, evaluated without drops"
    seeds = verdict.count(len({row["case"]["seed"] for row in rows}), "seed")
    return [
        _knees(curves, seeds, how),
        *made,
        *_orders(rows, gated, how),
        *_floor(gated, seeds, how),
        *_plus(curves, times, seeds, how),
    ]


def _knees(curves: Dict[str, Curve], seeds: str, how: str) -> Claim:
    told = []
    for router, results in curves.items():
        loss = losses(results)
        ends = ", ".join(f"{loss[factor]:.3f} at {factor:g}" for factor in (max(loss), min(loss)))
        told.append(f"{router} {knee(results):g} (loss within {tolerance(results):.1%}; {ends})")
    low = [USUAL - knee(results) for results in curves.values()]
    return Claim(
        "A capacity below the usual 1.1 to 1.25 loses nothing",
        "a low capacity suffices for alike tokens",
        f"knee: {'; '.join(told)}",
        seeds,
        how,
        *verdict.positive(low, f"the knee is below {USUAL:g}, router by router"),
    )


def _timing(times: List[Times]) -> Tuple[str, str]:
    """Of how many runs, and how."""
    rounds = len(next(iter(times[0].values())))
    return verdict.count(
        len(times), "run"
    ), f"{CONFIG}; every router and factor in turn in one process, medians of {rounds} rounds"


def _faster(times: List[Times]) -> Claim:
    saved: Dict[str, List[float]] = {}
    for run in times:
        factors = {factor for _, factor in run}
        for router in dict.fromkeys(router for router, _ in run):
            saved.setdefault(router, []).append(
                shorter(run, (router, min(factors)), (router, max(factors)))
            )
    told = "; ".join(
        f"{router} {verdict.spread(values, '.1%')}" for router, values in saved.items()
    )
    every = [value - 0.02 for values in saved.values() for value in values]
    return Claim(
        "A lower capacity makes a step shorter",
        "yes",
        f"from factor {max(factors):g} to {min(factors):g} shorter by: {told}",
        *_timing(times),
        *verdict.positive(
            every, "the step is at least 2% shorter, router by router and run by run"
        ),
    )


def _orders(measured: List[Measured], gated: Dict[str, Curve], how: str) -> List[Claim]:
    seeds = sorted({row["case"]["seed"] for row in measured if row["case"]["order"] == "position"})
    gains: Dict[Tuple[str, float], List[float]] = {}
    for seed in seeds:
        own = [row for row in measured if row["case"]["seed"] == seed]
        for router in gated:
            first, last = (losses(curve(own, router, order)) for order in ("affinity", "position"))
            for factor in sorted({*first} & {*last}):
                gains.setdefault((router, factor), []).append(last[factor] - first[factor])
    if not gains:
        return []
    told = "; ".join(
        f"{router} at {factor:g} {verdict.spread(values, '+.3f')}"
        for (router, factor), values in gains.items()
    )
    rule = verdict.positive(
        [statistics.mean(values) for values in gains.values()],
        "affinity order has the lower mean loss, router and factor",
    )
    return [
        Claim(
            "Dropping the tokens of least affinity is better than dropping the last",
            "LocMoE+ keeps the highest affinity",
            f"loss by position less loss by affinity: {told}",
            verdict.count(len(seeds), "seed"),
            how,
            *rule,
        )
    ]


def _floor(gated: Dict[str, Curve], seeds: str, how: str) -> List[Claim]:
    made = []
    for router, results in gated.items():
        least = knee(results)
        groups = [
            floors(result)
            for result in results.get(USUAL, results[max(results)])
            if result["delta"]
        ]
        mean = {key: statistics.mean(group[key] for group in groups) for key in groups[0]}
        told = "; ".join(
            f"{statistic}: "
            + ", ".join(f"{form} {_short(mean[statistic, form])}" for form in FORMS)
            for statistic in STATISTICS
        )
        rule = (
            f"{router}'s knee is within a factor of 2 of the exact form at the median cosine, "
            "and of the exponential form at the largest"
        )
        near = [_near(mean["median", "exact"], least), _near(mean["max", "exponential"], least)]
        made.append(
            Claim(
                f"The theorem's floor tells the capacity that is needed ({router})",
                "used to set the capacity",
                f"knee at factor {least:g}; floors as factors, by statistic of the cosines, {told}",
                seeds,
                how,
                *verdict.all_of(near, rule),
            )
        )
    return made


def _near(floor: float, factor: float) -> bool:
    return factor / 2 <= floor <= factor * 2


def _short(value: float) -> str:
    return f"{value:.3g}"


def _plus(curves: Dict[str, Curve], times: List[Times], seeds: str, how: str) -> List[Claim]:
    """LocMoE+ against LocMoE at the usual capacity: the smallest factor with the same loss, its
    time and its tokens.
    """
    faster = ("LocMoE+ is 2.9 to 13.3% faster than LocMoE", "2.9 to 13.3%")
    fewer = ("LocMoE+ needs 60% fewer tokens per expert", "60% and more")
    plus = curves.get("locmoe_plus")
    ours = curves.get("locmoe")
    if plus is None or ours is None or not ({USUAL, 1.0} & {*ours}):
        return [
            Claim(
                *names,
                "–",
                "–",
                "–",
                *verdict.cannot("this version has no router locmoe_plus, or it was not measured"),
            )
            for names in (faster, fewer)
        ]
    usual = USUAL if USUAL in ours else 1.0
    wanted = losses(ours)[usual] * (1 + tolerance(ours))
    enough = [factor for factor, loss in losses(plus).items() if loss <= wanted]
    if not enough:
        told = f"at no factor is its loss within {tolerance(ours):.1%} of locmoe's at {usual:g}"
        return [
            Claim(*names, told, seeds, how, *verdict.at_least([-1.0], 0.0, ".1%"))
            for names in (faster, fewer)
        ]
    factor = min(enough)
    alike = min(other for other, loss in losses(ours).items() if loss <= wanted)
    told = (
        f"at factor {factor:g}, whose loss is within {tolerance(ours):.1%} of locmoe's at "
        f"{usual:g}; so is locmoe's own at {alike:g}"
    )
    saved, fair = (
        [1 - one["capacity"] / other["capacity"] for one, other in zip(plus[factor], ours[than])]
        for than in (usual, alike)
    )
    made = [
        Claim(
            *fewer,
            (
                f"{verdict.spread(saved, '.0%')} {told}, and against that "
                f"{verdict.spread(fair, '.0%')}"
            ),
            seeds,
            how,
            *verdict.at_least([min(pair) for pair in zip(saved, fair)], 0.6, ".0%"),
        )
    ]
    if times:
        usually, fairly = (
            [shorter(run, ("locmoe_plus", factor), ("locmoe", than)) for run in times]
            for than in (usual, alike)
        )
        ours_ = (
            f"{verdict.spread(usually, '.1%')} {told}, and against that "
            f"{verdict.spread(fairly, '.1%')}"
        )
        made.insert(
            0,
            Claim(
                *faster,
                ours_,
                *_timing(times),
                *verdict.at_least([min(pair) for pair in zip(usually, fairly)], 0.029, ".1%"),
            ),
        )
    return made


def table(measured: List[Measured]) -> str:
    """Everything by router, who is dropped first, and factor."""
    rows, times = _parts(measured)
    head = [
        "router",
        "dropped first",
        "factor",
        "slots of an expert",
        "validation loss",
        "against the largest factor",
        "dropped",
        "milliseconds a step",
        "loss on other documents, 95%",
    ]
    lines = [head, ["---"] * len(head)]
    for router in dict.fromkeys(row["case"]["router"] for row in rows):
        for order in ("affinity", "position"):
            results = curve(rows, router, order)
            reference = losses(curve(rows, router))
            for factor, group in results.items():
                loss = final_losses(group)
                dropped = [result["dropped_fraction"] for result in group]
                seconds = [
                    1e3 * statistics.median(run[router, factor])
                    for run in times
                    if order == "affinity" and (router, factor) in run
                ]
                gain = losses(results)[factor] / reference[max(reference)] - 1
                first = {"affinity": "least affinity", "position": "last position"}[order]
                lines.append(
                    [
                        router,
                        first,
                        f"{factor:g}",
                        str(group[0]["capacity"]),
                        verdict.spread(loss),
                        f"{gain:+.1%}",
                        verdict.spread(dropped, ".1%"),
                        verdict.spread(seconds, ".1f"),
                        on_other_documents([result.get("blocks") for result in group]),
                    ]
                )
    known = any(line[-1] != UNKNOWN for line in lines[2:])
    return "\n".join("| " + " | ".join(line if known else line[:-1]) + " |" for line in lines)


def draw(measured: List[Measured], path: Path) -> None:
    """Loss and time against the factor, and delta over the steps."""
    from study import charts

    rows, times = _parts(measured)
    lines = charts.Lines(3)
    for router in dict.fromkeys(row["case"]["router"] for row in rows):
        for order, style in (("affinity", "o-"), ("position", "x--")):
            results = curve(rows, router, order)
            if results:
                loss = losses(results)
                lines.add(
                    0,
                    router,
                    list(loss),
                    list(loss.values()),
                    style,
                    router if order == "affinity" else f"{router}, by position",
                )
        results = curve(rows, router)
        timed = (
            [factor for factor in results if all((router, factor) in run for run in times)]
            if times
            else []
        )
        lines.add(
            1,
            router,
            timed,
            [
                1e3 * statistics.mean(statistics.median(run[router, factor]) for run in times)
                for factor in timed
            ],
            "o-",
        )
        first = results.get(USUAL, results[max(results)])[0]
        if first["delta"]:
            _delta(lines, router, first["delta"])
            lines.mark(
                0, min(floors(first)["median", "exact"], max(results)), router, f"floor of {router}"
            )
    lines.save(
        path,
        [
            ("capacity factor in training", "validation loss, no drops"),
            ("capacity factor in training", "milliseconds a step"),
            ("steps", "median cosine of token and gate, by layer"),
        ],
    )


def _delta(lines: Any, router: str, delta: Sequence[Dict[str, Any]]) -> None:
    for layer, style in zip(range(len(delta[0]["median"])), ("-", "--", "-.", ":") * 8):
        lines.add(
            2,
            router,
            [point["step"] for point in delta],
            [point["median"][layer] for point in delta],
            style,
            f"{router}, layer {layer}",
        )


EXPERIMENT = Experiment(
    "capacity",
    cases,
    measure,
    claims,
    draw,
    (
        "Loss and time against the capacity factor (dotted: the exact floor at the median "
        "cosine, cut off at the largest factor), and delta while training"
    ),
    table,
)
