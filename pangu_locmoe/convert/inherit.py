"""A sparse model from a dense checkpoint (PanGu-Sigma's inheritance): the feed-forward network
becomes every expert.

With the hash router, whose weight is 1, the sparse model gives the dense model's logits at once. A
gated router scales an expert's output by a probability p < 1, so the experts' output matrices are
divided by the mean p of their layer, measured on training text while the weights are held at 1,
where the hidden states are the dense model's own. The sparse model then equals the dense one on
average, and token by token as far as p varies little.

Letters: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from mindspore import Tensor

from pangu_locmoe.checkpoint.format import (
    find_checkpoint,
    own_tokenizer,
    read_config,
    read_identity,
    read_shards,
    save_checkpoint,
)
from pangu_locmoe.checkpoint.restore import in_one_process
from pangu_locmoe.checkpoint.shards import Held, named_arrays, set_parameters
from pangu_locmoe.config import Config
from pangu_locmoe.config.stored import as_before
from pangu_locmoe.data.packing import positions_and_segments
from pangu_locmoe.data.prepared import Prepared, prepare
from pangu_locmoe.errors import CheckpointError
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.capacity import DROPLESS
from pangu_locmoe.moe.routers import router_class
from pangu_locmoe.parallel.world import World

_CALIBRATION_SEQUENCES = 16  # of each domain


def inherit(dense: Path, config: Config, output: Path) -> str:
    """Write a checkpoint of the sparse model and return a line that says what was done.

    Args:
        dense: run directory or checkpoint of a model whose layers this one's FFNs come from.
        config: the sparse model; sizes must be the dense one's.
        output: folder of the new checkpoint; must not exist.

    Raises:
        CheckpointError: the dense model does not fit, or `output` exists.
    """
    if output.exists():
        raise CheckpointError(f"--output {output}: exists already")
    folder = find_checkpoint(dense)
    config, taken = as_before(config, read_config(folder), "model")
    # The weights only mean something with the tokenizer they were trained with.
    tokenizer_file = own_tokenizer(folder)
    data = config.data.model_copy(update={"tokenizer": str(tokenizer_file)})
    prepared = prepare(config.model_copy(update={"data": data}))
    own = in_one_process(config)
    model = PanguSigma(own, prepared.token_counts)
    copy_dense(read_shards(folder, "model"), model, str(folder))
    done = (
        f"{output}: {config.moe.num_experts} experts in each of {config.model.num_moe_layers} "
        f"layers from {folder}"
    )
    done += "".join(f"; {key} as there" for key in taken)
    if router_class(config).traits.has_gate:
        mean_weights = compensate(model, own, prepared)
        done += "; outputs divided by the mean probabilities " + ", ".join(
            f"{weight:.4f}" for weight in mean_weights
        )
    identity = read_identity(folder)
    state = {} if identity is None else {"identity": identity}
    save_checkpoint(output, config, tokenizer_file, model, state=state, world=World.of(own))
    return done


def copy_dense(arrays: Mapping[str, np.ndarray], model: PanguSigma, origin: str) -> None:
    """Set a sparse model's weights from a dense model's arrays; routers keep their own initial
    weights, and shared experts begin with an output of zero.
    """
    left = set(arrays)
    values: dict[str, np.ndarray] = {}
    for name, own in named_arrays(model.get_parameters(), Held.by(model)).items():
        if ".moe.router." in name:
            values[name] = own
            continue
        if ".shared_ffn." in name:  # adds nothing at first
            values[name] = np.zeros_like(own) if name.endswith("w_out") else own
            continue
        source = name
        if ".moe.experts." in name:
            block, _, rest = name.partition(".moe.experts.")
            source = f"{block}.ffn.{rest.split('.')[1]}"
        if source not in arrays:
            raise CheckpointError(f"{origin} has no {source}, which {name} should inherit")
        values[name] = arrays[source]
        left.discard(source)
    if left:
        raise CheckpointError(
            f"{origin} has {min(left)}, which has no place in the sparse model; is it "
            "dense, and as deep?"
        )
    set_parameters(model.get_parameters(), values, origin, Held.by(model))


def compensate(model: PanguSigma, config: Config, prepared: Prepared) -> list[float]:
    """Divide the experts' output matrices by their layer's mean router probability; returns
    those means.
    """
    layers = list(model.moe_layers.values())
    for layer in layers:
        layer.unit_weight = True
    capacities = (DROPLESS,) * len(layers)
    keys = Tensor(np.zeros(1, np.int32))
    weights = []
    tokens = []
    for domain, tokens_BS in training_text(prepared, config.micro_batch):
        positions_BS, segments_BS = positions_and_segments(
            tokens_BS, prepared.tokenizer.end_of_document, config.data.reset_at_document_end
        )
        arrays = (tokens_BS, positions_BS, segments_BS, np.full(len(tokens_BS), domain, np.int32))
        _, stats = model(*map(Tensor, arrays), (keys, keys), capacities, False)
        weights.append(stats["weight_L"].asnumpy())
        tokens.append(tokens_BS.size)
    means = np.average(weights, axis=0, weights=tokens)
    for layer, mean in zip(layers, means):
        layer.unit_weight = False
        w_out = layer.experts.w_out
        w_out.set_data(Tensor(w_out.asnumpy() / mean))
    return [float(mean) for mean in means]


def training_text(prepared: Prepared, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (domain, tokens_BS) of sequences spread over each domain's training text, at most
    `batch_size` at a time.

    Sequences are without the `<eod>` that pads a domain's last one: those that have some are
    shorter, and come with their like.
    """
    for domain, available in enumerate(prepared.num_sequences["train"]):
        numbers = (
            np.unique(
                np.linspace(0, available - 1, min(available, _CALIBRATION_SEQUENCES), dtype=int)
            )
            if available
            else []
        )
        inputs = prepared.sequences("train", domain, [int(number) for number in numbers])[:, :-1]
        real = inputs != prepared.tokenizer.end_of_document
        lengths = np.where(real.any(axis=1), inputs.shape[1] - real[:, ::-1].argmax(axis=1), 1)
        for length in np.unique(lengths):
            rows = np.ascontiguousarray(inputs[lengths == length, :length])
            for start in range(0, len(rows), batch_size):
                yield domain, rows[start : start + batch_size]
