"""The verbs that make a model of another one: inherit, extract, export, import-hf."""

from __future__ import annotations

import argparse
from pathlib import Path

from pangu_locmoe.cli.flags import Verbs, add_checkpoint, add_verb


def _add_inherit(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "inherit",
        _inherit,
        "make a sparse model from a dense checkpoint: its feed-forward networks become the experts",
        writes=True,
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


def _inherit(options: argparse.Namespace) -> int:
    from pangu_locmoe.checkpoint.restore import format_checkpoint, used_checkpoint
    from pangu_locmoe.config import load_config
    from pangu_locmoe.convert.inherit import inherit

    print(format_checkpoint(used_checkpoint(options.checkpoint)))
    print(inherit(options.checkpoint, load_config(options.config, options.set), options.output))
    return 0


def _add_extract(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "extract",
        _extract,
        "take one domain's sub-model out of a model with two-level routing",
        writes=True,
    )
    add_checkpoint(verb)
    verb.add_argument("--domain", required=True)
    verb.add_argument("--output", type=Path, required=True, help="folder of the new checkpoint")


def _extract(options: argparse.Namespace) -> int:
    from pangu_locmoe.checkpoint.restore import format_checkpoint, used_checkpoint
    from pangu_locmoe.convert.extract import extract

    print(format_checkpoint(used_checkpoint(options.checkpoint)))
    print(extract(options.checkpoint, options.domain, options.output))
    return 0


def _add_export(verbs: Verbs) -> None:
    verb = add_verb(
        verbs, "export", _export, "write a model as a folder that other libraries load", writes=True
    )
    add_checkpoint(verb)
    verb.add_argument(
        "--format",
        choices=("hf",),
        required=True,
        help="hf: Hugging Face Transformers, with the PyTorch model beside the weights",
    )
    verb.add_argument("--output", type=Path, required=True, help="the folder; must not exist")


def _export(options: argparse.Namespace) -> int:
    from pangu_locmoe.checkpoint.restore import format_checkpoint, used_checkpoint
    from pangu_locmoe.convert.hf.exporting import export

    print(format_checkpoint(used_checkpoint(options.checkpoint)))
    print(export(options.checkpoint, options.output))
    return 0


def _add_import_hf(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "import-hf",
        _import_hf,
        "make a checkpoint of an exported model, as save_pretrained writes it too",
        writes=True,
    )
    verb.add_argument("folder", type=Path, metavar="DIR", help="the exported model")
    verb.add_argument(
        "--output", type=Path, required=True, help="folder of the new checkpoint; must not exist"
    )


def _import_hf(options: argparse.Namespace) -> int:
    from pangu_locmoe.convert.hf.importing import import_hf

    print(import_hf(options.folder, options.output))
    return 0


VERBS = (_add_inherit, _add_extract, _add_export, _add_import_hf)
