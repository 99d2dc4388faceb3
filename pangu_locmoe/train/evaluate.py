"""Validation loss, perplexity and bits per byte, for each domain and for all text.

Evaluation never drops a token, so that a token's loss depends on nothing but the text before it.

Letters: B batch, S sequence, T = B*S tokens, V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Dict, Optional

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from pangu_locmoe.checkpoint.format import own_tokenizer, read_identity, same_tokenizer
from pangu_locmoe.checkpoint.restore import restore_model, used_checkpoint
from pangu_locmoe.config import Config
from pangu_locmoe.data.identity import differences
from pangu_locmoe.data.loader import validation_batches
from pangu_locmoe.data.prepared import Prepared, prepare
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.capacity import DROPLESS
from pangu_locmoe.parallel.world import World
from pangu_locmoe.train.intervals import Blocks, in_blocks, interval


class TokenLosses(nn.Cell):
    """Each token's loss, fp32 [T], without drops and without dropout."""

    def __init__(self, model: PanguSigma, config: Config) -> None:
        super().__init__(auto_prefix=False)
        self.model = model
        self.capacities = (DROPLESS,) * config.model.num_moe_layers
        self.row_keys = Tensor(np.zeros(1, np.int32))
        self.column_keys = Tensor(np.zeros(1, np.int32))

    def construct(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor,
        domains_B: Tensor,
    ) -> Tensor:
        noise = (self.row_keys, self.column_keys)
        logits_TV, _ = self.model(
            tokens_BS, positions_BS, segments_BS, domains_B, noise, self.capacities, False
        )
        return self.model.vocabulary.token_losses(logits_TV, ops.reshape(targets_BS, (-1,)))


class Evaluator:
    """Evaluates a model on validation sequences of each domain; compiles once.

    The replicas of a job share every batch.

    Attributes:
        blocks: what the latest figures' interval is made of.
    """

    def __init__(
        self, model: PanguSigma, config: Config, prepared: Prepared, world: Optional[World] = None
    ) -> None:
        self.world = world or World.of(config)
        self.config = config
        self.prepared = prepared
        self.blocks: Blocks = {}
        losses = TokenLosses(model, config)
        self._losses = (
            ms.jit(losses)
            if config.train.mode == "graph" and self.world.exchange is None
            else losses
        )
        self._token_bytes_V = np.zeros(config.model.vocab_size, np.int64)
        self._token_bytes_V[: len(prepared.tokenizer.token_bytes)] = prepared.tokenizer.token_bytes

    def __call__(self, sequences: int | None = None) -> Dict[str, Any]:
        """Returns validation_loss (nats per token), bits_per_byte, both by domain, and what they
        were measured on.

        Losses are of targets that are text, none of what fills up a short side or a batch. The
        figures for all text weigh the domains by their validation tokens and bytes, as the bigram's
        do. validation_loss_interval: where 95% of other documents of this kind would have it
        (intervals.py); None where a domain has one document.

        Args:
            sequences: of each domain; None: what the configuration says.
        """
        sums = {
            domain: np.zeros((len(starts), 3))
            for domain, starts in zip(self.prepared.domains, self.prepared.document_starts)
        }
        read = dict.fromkeys(sums, 0)
        topology = self.world.topology
        communicator = self.world.communicator
        replicas = topology.num_replicas if self.world.exchange is not None else 1
        replica = topology.replica_of_rank(communicator.rank)
        evaluation = self.config.evaluation
        # Every replica takes an equal part of a batch.
        size = -(-(evaluation.batch_size or self.config.micro_batch) // replicas) * replicas
        for domain, batch in validation_batches(
            self.prepared,
            sequences or evaluation.sequences,
            size,
            self.config.data.reset_at_document_end,
        ):
            arrays = (
                batch.tokens_BS,
                batch.targets_BS,
                batch.positions_BS,
                batch.segments_BS,
                batch.domains_B,
            )
            part = slice(replica * size // replicas, (replica + 1) * size // replicas)
            losses = communicator.all_gather(
                self._losses(*(Tensor(array[part]) for array in arrays))
            )
            losses_BS = losses.asnumpy()[:: topology.tensor_parallel].reshape(batch.tokens_BS.shape)
            text_BS = batch.documents_BS >= 0
            targets = batch.targets_BS[text_BS]
            name = self.prepared.domains[domain]
            np.add.at(
                sums[name],
                batch.documents_BS[text_BS],
                np.stack(
                    [losses_BS[text_BS], np.ones(len(targets)), self._token_bytes_V[targets]],
                    axis=1,
                ),
            )
            read[name] += int(batch.valid_B.sum())
        return self._row(sums, read)

    def _row(self, sums: Dict[str, np.ndarray], read: Dict[str, int]) -> Dict[str, Any]:
        """`sums`: nats, tokens and bytes of each document of a domain, [B, 3]; `read`:
        sequences.
        """
        counts = self.prepared.counts["validation"]
        self.blocks = {
            name: {"weight": counts[name]["tokens"], "sums": in_blocks(sums_B3[:, :2])}
            for name, sums_B3 in sums.items()
        }
        totals = {name: sums_B3.sum(axis=0).tolist() for name, sums_B3 in sums.items()}
        nats = {name: loss / tokens for name, (loss, tokens, _) in totals.items()}
        bits = {
            name: loss / (math.log(2) * size) if size else math.nan
            for name, (loss, _, size) in totals.items()
        }
        measured_on = {
            name: {
                "documents": int((sums_B3[:, 1] > 0).sum()),
                "sequences": read[name],
                "tokens": int(totals[name][1]),
            }
            for name, sums_B3 in sums.items()
        }
        return {
            "validation_loss": _weighted(
                nats, {domain: counts[domain]["tokens"] for domain in nats}
            ),
            "validation_loss_interval": interval(self.blocks),
            "bits_per_byte": _weighted(bits, {domain: counts[domain]["bytes"] for domain in bits}),
            "validation_loss_by_domain": nats,
            "bits_per_byte_by_domain": bits,
            "measured_on": measured_on,
        }


def format_evaluation(row: Dict[str, Any], bigram: Dict[str, float]) -> str:
    """The figures of one evaluation as a table, the byte bigram's bits per byte and what they
    were measured on beside them.
    """
    measured_on = row["measured_on"]
    total = {
        unit: sum(counts[unit] for counts in measured_on.values())
        for unit in ("documents", "sequences", "tokens")
    }
    lines = [
        f"{'':12}{'loss':>8}{'perplexity':>12}{'bits/byte':>11}{'bigram':>8}{'documents':>11}{'sequences':>11}{'tokens':>9}"
    ]
    for domain, loss in row["validation_loss_by_domain"].items():
        lines.append(
            _line(
                domain,
                loss,
                row["bits_per_byte_by_domain"][domain],
                bigram[domain],
                measured_on[domain],
            )
        )
    lines.append(_line("all", row["validation_loss"], row["bits_per_byte"], bigram["all"], total))
    return "\n".join(lines)


def format_interval(row: Dict[str, Any]) -> str:
    """A line on how far the loss over all text would move with other documents."""
    if row["validation_loss_interval"] is None:
        return "loss of other documents of this kind: not known, a domain has only one"
    low, high = row["validation_loss_interval"]
    return f"loss of other documents of this kind: {low:.3f} to {high:.3f} (95%)"


def _line(name: str, loss: float, bits: float, bigram: float, counts: Dict[str, int]) -> str:
    figures = f"{name:12}{loss:8.3f}{math.exp(loss):12.1f}{bits:11.3f}{bigram:8.3f}"
    return f"{figures}{counts['documents']:11}{counts['sequences']:11}{counts['tokens']:9}"


def _weighted(values: Dict[str, float], weights: Dict[str, int]) -> float:
    return sum(values[name] * weights[name] for name in values) / sum(weights.values())


def evaluate_checkpoint(path: Path, sequences: Optional[int] = None) -> Dict[str, Any]:
    """Evaluate a run directory's newest checkpoint, or a checkpoint, on the validation text of its
    sources.

    The row also has what `used_checkpoint` says, and `other_data`: what of the text is not what the
    weights were trained on, an empty list where it is the same; None for a checkpoint of an older
    version, which does not tell.

    Args:
        path: run directory or checkpoint.
        sequences: validation sequences of each domain; None: evaluation.sequences.
    """
    if sequences is not None and sequences < 1:
        raise ConfigError(f"--sequences {sequences}: must be at least 1")
    used = used_checkpoint(path)
    folder = Path(used["checkpoint"])
    tokenizer_file = own_tokenizer(folder)
    model, config = restore_model(folder)
    prepared = prepare(config)
    if not same_tokenizer(tokenizer_file, prepared.path / "tokenizer.json"):
        # Other text, or only a part of what a sub-model was trained on, would give another
        # tokenizer.
        data = config.data.model_copy(update={"tokenizer": str(tokenizer_file)})
        prepared = prepare(config.model_copy(update={"data": data}))
    trained_on = read_identity(folder)
    other_data = None if trained_on is None else differences(trained_on, prepared.identity)
    if other_data is None:
        used["notes"].append(
            "the checkpoint does not say what text it was trained on (an older version wrote it)"
        )
    elif other_data:
        used["notes"].append(
            f"not the data the checkpoint was trained on: {', '.join(other_data)} changed"
        )
    evaluator = Evaluator(model, config, prepared)
    row = {**used, "other_data": other_data, **evaluator(sequences), "blocks": evaluator.blocks}
    row["perplexity"] = math.exp(row["validation_loss"])
    row["perplexity_by_domain"] = {
        domain: math.exp(loss) for domain, loss in row["validation_loss_by_domain"].items()
    }
    row["bigram_bits_per_byte"] = prepared.bigram_bits_per_byte
    return row
