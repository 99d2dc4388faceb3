"""The verbs: parse, call, print; no logic.

A LocMoEError is one line on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Callable, List, NoReturn, Optional

from pangu_locmoe import __version__, console, interrupts
from pangu_locmoe.cli import load as cli_load
from pangu_locmoe.errors import ConfigError, LocMoEError
from pangu_locmoe.files import json_text

if TYPE_CHECKING:
    from pangu_locmoe.config import SampleConfig

# MindSpore and the model are imported inside the verbs: `--help` and `capacity` should not wait
# seconds for them.

Verb = Callable[[argparse.Namespace], int]


def main(arguments: Optional[List[str]] = None) -> int:
    """Run one verb and return the exit code: 0, 2 with one line for what the user can mend, 1
    for a check that failed, 128 + signal.
    """
    options = _parser().parse_args(arguments)
    verb: Verb = options.verb
    try:
        with interrupts.heard(), console.forgiving(verb in _WRITERS):
            return verb(options)
    except LocMoEError as error:
        with console.forgiving():
            print(f"pangu-locmoe: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1
    except BaseException as error:
        if not _was_interrupted(error):
            raise
        # At once, because the interpreter's end takes seconds with MindSpore and aborts if its
        # import was interrupted.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(130)


def _was_interrupted(error: Optional[BaseException]) -> bool:
    """Whether Ctrl-C is behind an error; libraries that are being imported make others of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _train(options: argparse.Namespace) -> int:
    from pangu_locmoe.config import load_config
    from pangu_locmoe.parallel.world import join
    from pangu_locmoe.train.claim import default_run_dir
    from pangu_locmoe.train.run import train

    communicator = join()
    config = load_config(options.config, options.set)
    resume = options.resume == "auto"
    given = nullcontext(options.run_dir)
    with (
        given
        if options.run_dir
        else default_run_dir(
            options.config.stem, config.moe.router, resume, communicator
        ) as run_dir
    ):
        stopped_by = train(
            config, run_dir, resume, options.init_from, not options.no_progress, communicator
        )
    return 0 if stopped_by is None else 128 + stopped_by


def _prepare(options: argparse.Namespace) -> int:
    from pangu_locmoe.config import load_config
    from pangu_locmoe.data.prepared import prepare

    prepared = prepare(load_config(options.config, options.set))
    print(f"{prepared.summary()}\n{prepared.path}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from pangu_locmoe.checkpoint.restore import format_checkpoint
    from pangu_locmoe.train.evaluate import evaluate_checkpoint, format_evaluation, format_interval

    row = evaluate_checkpoint(options.checkpoint, options.sequences)
    parts = (
        format_evaluation(row, row["bigram_bits_per_byte"]),
        format_interval(row),
        format_checkpoint(row),
    )
    print(json_text(row) if options.json else "\n".join(parts))
    return 0


def _generate(options: argparse.Namespace) -> int:
    from pangu_locmoe.checkpoint.restore import (
        format_checkpoint,
        restore_generator,
        used_checkpoint,
    )
    from pangu_locmoe.generate import domain_index, read_prompts

    sample = _sample(options)
    prompts = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else ())] or [""]
    generator = restore_generator(options.checkpoint)
    domain = domain_index(generator.config, options.domain)
    print(
        format_checkpoint(used_checkpoint(options.checkpoint)), file=sys.stderr
    )  # the text alone is the output
    for number, prompt in enumerate(prompts, 1):
        pieces = (piece for (piece,) in generator.stream([prompt], [domain], sample, options.seed))
        if options.json:
            row = {"prompt": prompt, "text": "".join(pieces)}
            print(json_text(row, ascii_only=False), flush=True)
            continue
        if len(prompts) > 1:
            print(f"--- {number} ---")
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    return 0


def _sample(options: argparse.Namespace) -> SampleConfig:
    from pydantic import ValidationError

    from pangu_locmoe.config import SampleConfig
    from pangu_locmoe.config.models import MAX_SEED

    if not 0 <= options.seed <= MAX_SEED:
        _usage_error(f"--seed {options.seed}: must be from 0 to {MAX_SEED}")
    try:
        return SampleConfig(
            tokens=options.tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
        )
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-")
        _usage_error(
            f"--{flag} {first['input']}: must be {first['msg'].removeprefix('Input should be ')}"
        )


def _capacity(options: argparse.Namespace) -> int:
    from pangu_locmoe.moe.capacity import capacity_bounds

    try:
        bounds = capacity_bounds(options.hidden_size, options.num_experts, options.cosine)
    except ValueError as error:
        _usage_error(str(error))
    print(json_text(dataclasses.asdict(bounds)))
    return 0


def _report(options: argparse.Namespace) -> int:
    from pangu_locmoe.report.page import build_report

    output = options.output or options.runs[0] / "report.html"
    print(build_report(options.runs, output))
    return 0


def _inherit(options: argparse.Namespace) -> int:
    from pangu_locmoe.checkpoint.restore import format_checkpoint, used_checkpoint
    from pangu_locmoe.config import load_config
    from pangu_locmoe.convert.inherit import inherit

    print(format_checkpoint(used_checkpoint(options.checkpoint)))
    print(inherit(options.checkpoint, load_config(options.config, options.set), options.output))
    return 0


def _extract(options: argparse.Namespace) -> int:
    from pangu_locmoe.checkpoint.restore import format_checkpoint, used_checkpoint
    from pangu_locmoe.convert.extract import extract

    print(format_checkpoint(used_checkpoint(options.checkpoint)))
    print(extract(options.checkpoint, options.domain, options.output))
    return 0


def _export(options: argparse.Namespace) -> int:
    from pangu_locmoe.checkpoint.restore import format_checkpoint, used_checkpoint
    from pangu_locmoe.convert.hf.exporting import export

    print(format_checkpoint(used_checkpoint(options.checkpoint)))
    print(export(options.checkpoint, options.output))
    return 0


def _import_hf(options: argparse.Namespace) -> int:
    from pangu_locmoe.convert.hf.importing import import_hf

    print(import_hf(options.folder, options.output))
    return 0


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


def _simulate(options: argparse.Namespace) -> int:
    from pangu_locmoe.config import load_config
    from pangu_locmoe.simulate import Assumptions, Device, simulate

    load = None if options.load is None else cli_load.read(options.load)
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


_WRITERS = (_prepare, _train, _report, _inherit, _extract, _export, _import_hf)
"""The verbs whose result is files, whatever becomes of what they print."""


def _whole_numbers(text: str) -> List[int]:
    """8,16,32 as a list; argparse turns a ValueError into one line."""
    return [int(part) for part in text.split(",")]


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists what there is\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pangu-locmoe", description="Train and study LocMoE models with MindSpore."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    verb = _add(
        verbs,
        "prepare",
        _prepare,
        "train or load the tokenizer and pack the corpus into MindRecord files",
    )
    _add_config(verb)

    verb = _add(verbs, "train", _train, "train, evaluate, print samples and write the report")
    _add_config(verb)
    verb.add_argument("--run-dir", type=Path, help="where the run is kept (runs/CONFIG-ROUTER)")
    verb.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="never",
        help="auto: continue from the newest checkpoint if there is one",
    )
    verb.add_argument(
        "--init-from",
        type=Path,
        metavar="CHECKPOINT",
        help="start from these weights, for example an inherited model",
    )
    verb.add_argument("--no-progress", action="store_true", help="no progress bar")

    verb = _add(verbs, "evaluate", _evaluate, "loss, perplexity and bits per byte of each domain")
    _add_checkpoint(verb)
    verb.add_argument(
        "--sequences", type=int, help="validation sequences of each domain (evaluation.sequences)"
    )
    verb.add_argument("--json", action="store_true", help="print JSON")

    verb = _add(verbs, "generate", _generate, "continue a text")
    _add_checkpoint(verb)
    verb.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="the beginning of the text; once for each of several",
    )
    verb.add_argument("--prompts", type=Path, metavar="FILE", help="more of them, one a line")
    verb.add_argument("--domain", help="the domain the text is of (the first)")
    verb.add_argument("--tokens", type=int, default=128)
    verb.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest token"
    )
    verb.add_argument("--top-k", type=int, default=40, help="0: no limit")
    verb.add_argument("--top-p", type=float, default=0.95)
    verb.add_argument(
        "--seed", type=int, default=1, help="fixes each text, whatever else is asked for (1)"
    )
    verb.add_argument("--json", action="store_true", help="a line of JSON for each prompt")

    verb = _add(
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

    verb = _add(
        verbs, "report", _report, "one self-contained page on one run, or comparing several"
    )
    verb.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    verb.add_argument("--output", type=Path, help="the page (RUN_DIR/report.html of the first)")

    verb = _add(
        verbs,
        "check",
        _check,
        (
            "compile one rank's step of an Ascend job, here and without devices, and list what "
            "it communicates"
        ),
    )
    _add_config(verb)
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

    verb = _add(
        verbs,
        "inherit",
        _inherit,
        "make a sparse model from a dense checkpoint: its feed-forward networks become the experts",
    )
    verb.add_argument("checkpoint", type=Path, metavar="DENSE", help="run directory or checkpoint")
    verb.add_argument("--config", type=Path, required=True, help="the sparse model")
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    verb.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder of the new checkpoint, for train --init-from",
    )

    verb = _add(
        verbs,
        "extract",
        _extract,
        "take one domain's sub-model out of a model with two-level routing",
    )
    _add_checkpoint(verb)
    verb.add_argument("--domain", required=True)
    verb.add_argument("--output", type=Path, required=True, help="folder of the new checkpoint")

    verb = _add(
        verbs,
        "export",
        _export,
        "write a model as a folder that other libraries load",
    )
    _add_checkpoint(verb)
    verb.add_argument(
        "--format",
        choices=("hf",),
        required=True,
        help="hf: Hugging Face Transformers, with the PyTorch model beside the weights",
    )
    verb.add_argument("--output", type=Path, required=True, help="the folder; must not exist")

    verb = _add(
        verbs,
        "import-hf",
        _import_hf,
        "make a checkpoint of an exported model, as save_pretrained writes it too",
    )
    verb.add_argument("folder", type=Path, metavar="DIR", help="the exported model")
    verb.add_argument(
        "--output", type=Path, required=True, help="folder of the new checkpoint; must not exist"
    )

    verb = _add(
        verbs,
        "simulate",
        _simulate,
        "model the step time of a configuration on clusters of several sizes, router by router",
    )
    _add_config(verb)
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

    load = verbs.add_parser(
        "load",
        help="expert load: import, states, forecast, place, report",
        description="Study the load of experts.",
        allow_abbrev=False,
    )
    cli_load.add_load_verbs(load.add_subparsers(required=True, metavar="VERB"), _add)
    return parser


def _add(
    verbs: argparse._SubParsersAction[_Parser], name: str, verb: Verb, text: str
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    parser.set_defaults(verb=verb)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        type=Path,
        metavar="CONFIG",
        help="a YAML file, for example configs/cpu_smoke.yaml",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one value, for example moe.router=switch; repeatable",
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="run directory (its newest checkpoint) or checkpoint folder",
    )


def _usage_error(message: str) -> NoReturn:
    raise LocMoEError(message)
