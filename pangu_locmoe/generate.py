"""Text from a trained model, token by token.

Letters: B prompts, S sequence, V vocabulary.
"""

from __future__ import annotations

from typing import Iterator, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from pangu_locmoe.config import Config, SampleConfig
from pangu_locmoe.data.packing import positions_and_segments
from pangu_locmoe.data.tokenizer import StreamDecoder, Tokenizer
from pangu_locmoe.errors import DataError
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.capacity import DROPLESS


class NextTokenLogits(nn.Cell):
    """Logits fp32 [B, V] of the token after position `last_B` of each sequence; no token is ever
    dropped.
    """

    def __init__(self, model: PanguSigma, config: Config) -> None:
        super().__init__(auto_prefix=False)
        self.model = model
        self.capacities = (DROPLESS,) * config.model.num_moe_layers
        self.keys = Tensor(np.zeros(1, np.int32))

    def construct(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor,
        domains_B: Tensor,
        last_B: Tensor,
    ) -> Tensor:
        batch, length = tokens_BS.shape
        logits_TV, _ = self.model(
            tokens_BS,
            positions_BS,
            segments_BS,
            domains_B,
            (self.keys, self.keys),
            self.capacities,
            False,
        )
        rows_B = Tensor(np.arange(batch, dtype=np.int32)) * length + last_B
        return self.model.vocabulary.whole(ops.gather(logits_TV, rows_B, 0))


class Generator:
    """Samples continuations. Compiles once for each number of prompts.

    The whole window of `seq_length` tokens is computed for every new token: short samples from
    small models are what this is for. A text longer than the window keeps its last half.
    """

    def __init__(
        self, model: PanguSigma, config: Config, tokenizer: Tokenizer, compiled: bool = True
    ) -> None:
        """`compiled`: whether the model can be compiled as a whole; one whose experts are in
        several processes cannot.
        """
        self.config = config
        self.tokenizer = tokenizer
        logits = NextTokenLogits(model, config)
        self._logits = ms.jit(logits) if compiled and config.train.mode == "graph" else logits

    def stream(
        self, prompts: Sequence[str], domains: Sequence[int], sample: SampleConfig, seed: int
    ) -> Iterator[list[str]]:
        """Yield for every step the new characters of each prompt's continuation ("" while a
        character is not complete).

        A continuation ends at the end-of-document token.

        Args:
            prompts: texts; may be empty.
            domains: the domain id of each.
            sample: number of tokens, temperature, top-k and top-p.
            seed: fixes the draws.
        """
        generator = np.random.default_rng(seed)
        length = self.config.model.seq_length
        windows = [
            [self.tokenizer.end_of_document, *self.tokenizer.encode(prompt)] for prompt in prompts
        ]
        decoders = [StreamDecoder(self.tokenizer) for _ in prompts]
        open_B = [True] * len(prompts)
        for _ in range(sample.tokens):
            windows = [
                window if len(window) <= length else window[-(length // 2) :] for window in windows
            ]
            logits_BV = self._next(windows, np.asarray(domains, np.int32))
            pieces = []
            for index, window in enumerate(windows):
                piece = ""
                if open_B[index]:
                    token = choose(logits_BV[index], sample, generator)
                    open_B[index] = token != self.tokenizer.end_of_document
                    window.append(token)
                    piece = (
                        decoders[index].feed(token) if open_B[index] else decoders[index].flush()
                    )
                pieces.append(piece)
            yield pieces
            if not any(open_B):
                return
        yield [
            decoder.flush() if still_open else "" for decoder, still_open in zip(decoders, open_B)
        ]

    def __call__(
        self, prompts: Sequence[str], domains: Sequence[int], sample: SampleConfig, seed: int
    ) -> list[str]:
        """The continuations as whole texts."""
        texts = [""] * len(prompts)
        for pieces in self.stream(prompts, domains, sample, seed):
            texts = [text + piece for text, piece in zip(texts, pieces)]
        return texts

    def _next(self, windows: list[list[int]], domains_B: np.ndarray) -> np.ndarray:
        end = self.tokenizer.end_of_document
        tokens_BS = np.full((len(windows), self.config.model.seq_length), end, dtype=np.int32)
        for row, window in zip(tokens_BS, windows):
            row[: len(window)] = window
        positions_BS, segments_BS = positions_and_segments(
            tokens_BS, end, self.config.data.reset_at_document_end
        )
        last_B = np.asarray([len(window) - 1 for window in windows], np.int32)
        logits = self._logits(
            *map(Tensor, (tokens_BS, positions_BS, segments_BS, domains_B, last_B))
        )
        # The vocabulary of a small corpus may be smaller than the model's table.
        return np.asarray(logits.asnumpy()[:, : self.tokenizer.vocab_size])


def choose(logits_V: np.ndarray, sample: SampleConfig, generator: np.random.Generator) -> int:
    """Draw a token: temperature, then the top_k likeliest, then the likeliest whose
    probabilities reach top_p.
    """
    if sample.temperature == 0:
        return int(logits_V.argmax())
    order = np.argsort(-logits_V, kind="stable")
    if sample.top_k:
        order = order[: sample.top_k]
    scaled = logits_V[order].astype(np.float64) / sample.temperature
    probabilities = np.exp(scaled - scaled[0])
    probabilities /= probabilities.sum()
    # A token stays if those before it do not reach top_p yet, so the likeliest always stays.
    kept = int((np.cumsum(probabilities) - probabilities < sample.top_p).sum())
    return int(generator.choice(order[:kept], p=probabilities[:kept] / probabilities[:kept].sum()))


def domain_index(config: Config, name: str | None) -> int:
    """The id of a domain by name; None: the first. Raises DataError for an unknown one."""
    if name is None:
        return 0
    if name not in config.domains:
        raise DataError(f"--domain {name}: the model knows {', '.join(config.domains)}")
    return config.domains.index(name)
