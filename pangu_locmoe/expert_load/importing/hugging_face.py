"""Router logits of a Hugging Face model, saved as .npz; its experts are those of the top k.

`model(..., output_router_logits=True).router_logits` is a tuple with [tokens, experts] for each MoE
layer. Either one array `router_logits` [layers, ..., experts], which is also what an only array of
another name is, or one array [..., experts] for each layer, whose name ends in the layer's number, as np.savez(file, *arrays) writes them (arr_0, ...)
or with names of one's own (router_logits_0, layer_0, ...). Other arrays are ignored. Every file is
one step, in the order given. The k of the model is `top_k`, or a number num_experts_per_tok in the
file, as the model's config.json calls it. Ties go to the lower expert. Routers that choose by anything else than
the largest logits (groups of experts, a bias) are not told by logits.

Letters: W rows (files), L layers, E experts, T tokens, K choices.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.errors import DataError, one_line
from pangu_locmoe.expert_load.importing.arrays import Ints, padded, trace_of
from pangu_locmoe.expert_load.importing.limits import LARGEST_ARRAYS, Options, naming
from pangu_locmoe.expert_load.trace import Trace

NAME = "router_logits"
TOP_K = ("num_experts_per_tok", "top_k")
NUMBERED = re.compile(r"(?:.*\D)?(\d{1,9})$", re.ASCII)
BLOCK = 2**16  # tokens whose experts are chosen at once


def read(files: Sequence[Path], options: Options) -> Trace:
    """A row for each file. Raises DataError that names the file and the array."""
    loads: list[Ints] = []
    for path in files:
        with naming(path):
            arrays = _arrays(path)
            loads.append(_load(arrays, _top_k(arrays, options.top_k)))
            if loads[-1].shape != loads[0].shape:
                raise DataError(
                    f"has layers and experts {list(loads[-1].shape)}, "
                    f"{files[0]} has {list(loads[0].shape)}"
                )
    with naming(files[0]):
        load_WLE = padded(np.stack(loads), options.num_experts)
        return trace_of(range(len(loads)), load_WLE[:, :, None], sourced=False)


def _top_k(found: dict[str, NDArray[Any]], told: int | None) -> int:
    """What the user says, or the file. Raises DataError: neither does, or they differ."""
    kept = [found[name] for name in TOP_K if name in found]
    if kept and (kept[0].shape != () or kept[0].dtype.kind not in "iu" or kept[0] < 1):
        raise DataError("num_experts_per_tok must be a whole number of at least 1")
    if kept and told not in (None, int(kept[0])):
        raise DataError(f"num_experts_per_tok is {kept[0]}, top_k says {told}")
    if told is None and not kept:
        raise DataError(
            "router logits need top_k, the experts of a token (--top-k; num_experts_per_tok in "
            "the model's config.json)"
        )
    return int(kept[0]) if told is None else told


def _load(found: dict[str, NDArray[Any]], top_k: int) -> Ints:
    """Tokens of each expert, int64 [L, E]."""
    rows = [_counted(name, logits, top_k) for name, logits in _layers(found)]
    if len({len(row) for row in rows}) > 1:
        raise DataError(f"layers differ in experts: {[len(row) for row in rows][:8]}")
    return np.stack(rows)


def _layers(found: dict[str, NDArray[Any]]) -> list[tuple[str, NDArray[Any]]]:
    """Logits [..., E] of each layer, by name."""
    scores = {name: array for name, array in found.items() if _is_logits(array)}
    whole = NAME if NAME in found else next(iter(scores), NAME)
    if NAME in found or len(scores) == 1:
        array = found[whole]
        if array.ndim < 2:
            raise DataError(f"{whole} must be [layers, ..., experts], has shape {array.shape}")
        if array.ndim == 2:
            return [(whole, array)]
        return [(f"{whole}[{layer}]", part) for layer, part in enumerate(array)]
    of_layer: dict[int, str] = {}
    for name in scores:
        match = NUMBERED.match(name)
        if match and of_layer.setdefault(int(match[1]), name) != name:
            raise DataError(f"{name} and {of_layer[int(match[1])]} are of the same layer")
    if not of_layer:
        raise DataError(
            f"has neither {NAME} nor an array for each layer (arr_0, ...), "
            f"has {', '.join(found)[:80] or 'none'}"
        )
    return [(of_layer[layer], scores[of_layer[layer]]) for layer in sorted(of_layer)]


def _is_logits(array: NDArray[Any]) -> bool:
    return array.dtype.kind == "f" and array.ndim >= 2


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > LARGEST_ARRAYS:
            raise DataError(f"unpacks to {size} bytes, more than {LARGEST_ARRAYS}")
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
            # a member that is no .npy is bytes
            return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    except (DataError, OSError):
        raise
    except Exception as error:  # a damaged archive can raise almost anything
        raise DataError(f"not a whole .npz of numbers: {one_line(error)}") from None


def _counted(name: str, logits: NDArray[Any], top_k: int) -> Ints:
    """How many tokens have each expert among their top k, int64 [E]."""
    experts = logits.shape[-1]
    if logits.dtype.kind != "f":
        raise DataError(f"{name} must be floating-point logits, is {logits.dtype}")
    if 0 in logits.shape:
        raise DataError(f"{name} is empty: it has shape {list(logits.shape)}")
    if top_k > experts:
        raise DataError(f"{name} has {experts} experts, fewer than top_k {top_k}")
    count_E = np.zeros(experts, np.int64)
    logits_TE = logits.reshape(-1, experts)
    for first in range(0, len(logits_TE), BLOCK):
        block_TE = logits_TE[first : first + BLOCK]
        if np.isnan(block_TE).any():
            raise DataError(f"{name} holds NaN")
        expert_TK = np.argsort(-block_TE, axis=1, kind="stable")[:, :top_k]
        count_E += np.bincount(expert_TK.ravel(), minlength=experts)
    return count_E
