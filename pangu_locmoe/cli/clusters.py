"""The verbs about clusters that are not there: check, simulate, capacity."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import List

from pangu_locmoe.cli import load as load_verbs
from pangu_locmoe.cli.flags import Verbs, add_config, add_verb
from pangu_locmoe.errors import ConfigError, LocMoEError
from pangu_locmoe.files import json_text


def _add_check(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "check",
        _check,
        (
            "compile one rank's step of an Ascend job, here and without devices, and list what "
            "it communicates"
        ),
    )
    add_config(verb)
    verb.add_argument("--ranks", type=int, required=True, help="processes of the job")
    verb.add_argument(
        "--rank",
        type=int,
        nargs="+",
        metavar="R",
        help="whose step (0); several with --simulate (the first and the last)",
    )
    verb.add_argument(
        "--device",
        help=(
            "hold its memory against this device of pangu_locmoe/simulate/devices.yaml; exit "
            "code 1 where it does not fit"
        ),
    )
    verb.add_argument(
        "--simulate",
        action="store_true",
        help=(
            "a dry run as well: compile with MindSpore's Ascend back end, on stand-ins for CANN's "
            "libraries that gcc builds once, and walk through the launches of each rank. Proves "
            "that MindSpore has a kernel for every operator, what overlaps, and the order of "
            "collectives; no number, no time, and not that CANN has the operators. Exit code 1 for "
            "Python in the step, a missing kernel, or ranks whose collectives differ in order"
        ),
    )
    verb.add_argument("--json", action="store_true", help="print JSON")


def _check(options: argparse.Namespace) -> int:
    from pangu_locmoe.check.check import check, refuse_ranks, shallower
    from pangu_locmoe.check.dry_run.libraries import DEFAULT_CHIP, ready
    from pangu_locmoe.check.dry_run.run import dry_run
    from pangu_locmoe.config import load_config
    from pangu_locmoe.simulate.devices import Device

    config = load_config(options.config, options.set)
    device = None if options.device is None else Device.named(options.device)
    ranks = options.rank or ([0, options.ranks - 1] if options.simulate else [0])
    if len(ranks) > 1 and not options.simulate:
        raise ConfigError(f"--rank {' '.join(map(str, ranks))}: several only with --simulate")
    refuse_ranks(options.ranks, ranks)
    libraries = ready(cache_folder()) if options.simulate else None
    result = check(config, options.ranks, ranks[0], device)
    problems = []
    if result.differences:
        problems.append(f"the graph is not what the plan says: {'; '.join(result.differences)}")
    if result.too_large:
        problems.append(result.too_large)
    report = result.to_dict()
    text = result.format()
    if libraries is not None:
        chip = (device and device.chip) or DEFAULT_CHIP
        ranks = list(dict.fromkeys(ranks))
        run = dry_run(shallower(config), options.ranks, ranks, libraries, chip)
        problems += run.problems
        report["dry_run"] = run.to_dict()
        text += "\n" + run.format()
    print(json_text(report) if options.json else text)
    for problem in problems:
        print(f"pangu-locmoe: {problem}", file=sys.stderr)
    return 1 if problems else 0


def cache_folder() -> Path:
    """Where this command may keep what it can make again."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    # The specification has relative paths ignored.
    folder = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return folder / "pangu_locmoe"


def _add_simulate(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "simulate",
        _simulate,
        "model the step time of a configuration on clusters of several sizes, router by router",
    )
    add_config(verb)
    verb.add_argument(
        "--nodes",
        type=_whole_numbers,
        required=True,
        metavar="N,N,...",
        help="sizes of the cluster",
    )
    verb.add_argument(
        "--router",
        type=lambda text: text.split(","),
        default=["hash", "switch", "locmoe"],
        metavar="NAME,NAME,...",
        help="routers (hash,switch,locmoe)",
    )
    verb.add_argument(
        "--device", default="ascend_910a", metavar="NAME", help="processor and links (ascend_910a)"
    )
    verb.add_argument("--devices", type=Path, metavar="FILE.yaml", help="another file of devices")
    verb.add_argument(
        "--load",
        type=Path,
        metavar="TRACE",
        help="one router's routing from a run directory or trace, instead of assumed",
    )
    verb.add_argument(
        "--load-router",
        metavar="NAME",
        help="whose routing that is (the only router, or moe.router)",
    )
    verb.add_argument(
        "--ranks-per-node", type=int, metavar="R", help="ranks in each node (the device's)"
    )
    verb.add_argument(
        "--tensor-parallel",
        type=int,
        metavar="T",
        help="modelled only: ranks that share one layer's matrices",
    )
    verb.add_argument("--json", action="store_true", help="print JSON")


def _simulate(options: argparse.Namespace) -> int:
    from pangu_locmoe.config import load_config
    from pangu_locmoe.simulate import Assumptions, Device, simulate

    load = None if options.load is None else load_verbs.read(options.load)
    assumptions = Assumptions(
        tensor_parallel=options.tensor_parallel, ranks_per_node=options.ranks_per_node
    )
    device = (
        Device.named(options.device, options.devices)
        if options.devices
        else Device.named(options.device)
    )
    result = simulate(
        load_config(options.config, options.set),
        options.nodes,
        options.router,
        device,
        load,
        options.load_router,
        assumptions,
    )
    print(json_text(result.to_dict()) if options.json else result.format())
    return 0


def _whole_numbers(text: str) -> List[int]:
    """8,16,32 as a list; argparse turns a ValueError into one line."""
    return [int(part) for part in text.split(",")]


def _add_capacity(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "capacity",
        _capacity,
        (
            "LocMoE's lower bound on the expert capacity, as JSON; its probability is of "
            "|cosine| >= delta, as published, twice that of a token on the expert's side"
        ),
    )
    verb.add_argument("--hidden-size", type=int, required=True, help="d")
    verb.add_argument("--num-experts", type=int, required=True, help="n")
    verb.add_argument(
        "--cosine",
        type=float,
        required=True,
        help="delta: the cosine from which on a token belongs to an expert",
    )


def _capacity(options: argparse.Namespace) -> int:
    from pangu_locmoe.moe.capacity import capacity_bounds

    try:
        bounds = capacity_bounds(options.hidden_size, options.num_experts, options.cosine)
    except ValueError as error:
        raise LocMoEError(str(error)) from None
    print(json_text(dataclasses.asdict(bounds)))
    return 0


VERBS = (_add_check, _add_simulate, _add_capacity)
