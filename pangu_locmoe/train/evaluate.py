"""Validation loss, perplexity and bits per byte, for each domain and for all text.

Evaluation never drops a token, so that a token's loss depends on nothing but the text before it.

Letters: B batch, S sequence, T = B*S tokens, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, Dict, Optional

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from pangu_locmoe.config import Config
from pangu_locmoe.data.loader import validation_batches
from pangu_locmoe.data.prepared import Prepared
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.capacity import DROPLESS
from pangu_locmoe.parallel.world import World


class TokenLosses(nn.Cell):
    """Each token's loss, fp32 [T], without drops and without dropout."""

    def __init__(self, model: PanguSigma, config: Config) -> None:
        super().__init__(auto_prefix=False)
        self.model = model
        self.capacities = (DROPLESS,) * config.model.num_moe_layers
        self.row_keys = Tensor(np.zeros(1, np.int32))
        self.column_keys = Tensor(np.zeros(1, np.int32))

    def construct(self, tokens_BS: Tensor, targets_BS: Tensor, positions_BS: Tensor, segments_BS: Tensor, domains_B: Tensor) -> Tensor:
        noise = (self.row_keys, self.column_keys)
        logits_TV, _ = self.model(tokens_BS, positions_BS, segments_BS, domains_B, noise, self.capacities, False)
        return self.model.vocabulary.token_losses(logits_TV, ops.reshape(targets_BS, (-1,)))


class Evaluator:
    """Evaluates a model on the first validation sequences of each domain; compiles once.

    The places of a job share every batch.
    """

    def __init__(self, model: PanguSigma, config: Config, prepared: Prepared, world: Optional[World] = None) -> None:
        self.world = world or World.of(config)
        self.config, self.prepared = config, prepared
        losses = TokenLosses(model, config)
        self._losses = ms.jit(losses) if config.train.mode == "graph" and self.world.exchange is None else losses
        self._token_bytes_V = np.zeros(config.model.vocab_size, np.int64)
        self._token_bytes_V[: len(prepared.tokenizer.token_bytes)] = prepared.tokenizer.token_bytes

    def __call__(self, sequences: int | None = None) -> Dict[str, Any]:
        """Returns validation_loss (nats per token), bits_per_byte, and both by domain.

        The figures for all text weigh the domains by their validation tokens and bytes, as the bigram's do.

        Args:
            sequences: of each domain; None: what the configuration says.
        """
        evaluation = self.config.evaluation
        nats: Dict[str, float] = {}
        bits: Dict[str, float] = {}
        totals = {domain: [0.0, 0, 0] for domain in self.prepared.domains}
        topology, communicator = self.world.topology, self.world.communicator
        places = topology.num_places if self.world.exchange is not None else 1
        place = topology.place_of_rank(communicator.rank)
        # Every place takes an equal share of a batch.
        size = -(-(evaluation.batch_size or self.config.micro_batch) // places) * places
        for domain, batch in validation_batches(self.prepared, sequences or evaluation.sequences, size, self.config.data.reset_at_document_end):
            arrays = (batch.tokens_BS, batch.targets_BS, batch.positions_BS, batch.segments_BS, batch.domains_B)
            share = slice(place * size // places, (place + 1) * size // places)
            losses = communicator.all_gather(self._losses(*(Tensor(array[share]) for array in arrays)))
            losses_BS = losses.asnumpy()[:: topology.tensor_parallel].reshape(batch.tokens_BS.shape)[batch.valid_B]
            total = totals[self.prepared.domains[domain]]
            total[0] += float(losses_BS.sum(dtype=np.float64))
            total[1] += losses_BS.size
            total[2] += int(self._token_bytes_V[batch.targets_BS[batch.valid_B]].sum())
        for name, (loss, tokens, size_in_bytes) in totals.items():
            nats[name] = loss / tokens if tokens else math.nan
            bits[name] = loss / (math.log(2) * size_in_bytes) if size_in_bytes else math.nan
        counts = self.prepared.counts["validation"]
        return {
            "validation_loss": _weighted(nats, {domain: counts[domain]["tokens"] for domain in nats}),
            "bits_per_byte": _weighted(bits, {domain: counts[domain]["bytes"] for domain in bits}),
            "validation_loss_by_domain": nats,
            "bits_per_byte_by_domain": bits,
        }


def format_evaluation(row: Dict[str, Any], bigram: Dict[str, float]) -> str:
    """The figures of one evaluation as a table, the byte bigram's bits per byte beside them."""
    lines = [f"{'':12}{'loss':>8}{'perplexity':>12}{'bits/byte':>11}{'bigram':>8}"]
    for domain, loss in row["validation_loss_by_domain"].items():
        lines.append(_line(domain, loss, row["bits_per_byte_by_domain"][domain], bigram[domain]))
    lines.append(_line("all", row["validation_loss"], row["bits_per_byte"], bigram["all"]))
    return "\n".join(lines)


def _line(name: str, loss: float, bits: float, bigram: float) -> str:
    return f"{name:12}{loss:8.3f}{math.exp(loss):12.1f}{bits:11.3f}{bigram:8.3f}"


def _weighted(values: Dict[str, float], weights: Dict[str, int]) -> float:
    return sum(values[name] * weights[name] for name in values) / sum(weights.values())
