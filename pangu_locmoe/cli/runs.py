"""The verbs of a run: prepare, train, evaluate, generate, report. They parse, call and print."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from pangu_locmoe.cli.flags import Verbs, add_checkpoint, add_config, add_verb
from pangu_locmoe.errors import LocMoEError
from pangu_locmoe.files import json_text

if TYPE_CHECKING:
    from pangu_locmoe.config import SampleConfig


def _add_prepare(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "prepare",
        _prepare,
        "train or load the tokenizer and pack the corpus into MindRecord files",
        writes=True,
    )
    add_config(verb)


def _prepare(options: argparse.Namespace) -> int:
    from pangu_locmoe.config import load_config
    from pangu_locmoe.data.prepared import prepare

    prepared = prepare(load_config(options.config, options.set))
    print(f"{prepared.summary()}\n{prepared.path}")
    return 0


def _add_train(verbs: Verbs) -> None:
    verb = add_verb(
        verbs, "train", _train, "train, evaluate, print samples and write the report", writes=True
    )
    add_config(verb)
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


def _add_evaluate(verbs: Verbs) -> None:
    verb = add_verb(
        verbs, "evaluate", _evaluate, "loss, perplexity and bits per byte of each domain"
    )
    add_checkpoint(verb)
    verb.add_argument(
        "--sequences", type=int, help="validation sequences of each domain (evaluation.sequences)"
    )
    verb.add_argument("--json", action="store_true", help="print JSON")


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


def _add_generate(verbs: Verbs) -> None:
    verb = add_verb(verbs, "generate", _generate, "continue a text")
    add_checkpoint(verb)
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
        raise LocMoEError(f"--seed {options.seed}: must be from 0 to {MAX_SEED}")
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
        raise LocMoEError(
            f"--{flag} {first['input']}: must be {first['msg'].removeprefix('Input should be ')}"
        ) from None


def _add_report(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "report",
        _report,
        "one self-contained page on one run, or comparing several",
        writes=True,
    )
    verb.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    verb.add_argument("--output", type=Path, help="the page (RUN_DIR/report.html of the first)")


def _report(options: argparse.Namespace) -> int:
    from pangu_locmoe.report.page import build_report

    output = options.output or options.runs[0] / "report.html"
    print(build_report(options.runs, output))
    return 0


VERBS = (_add_prepare, _add_train, _add_evaluate, _add_generate, _add_report)
