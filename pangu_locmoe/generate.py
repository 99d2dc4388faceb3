"""Text from a trained model, token by token.

Letters: B prompts, S sequence, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from pangu_locmoe.config import Config, SampleConfig
from pangu_locmoe.data.packing import positions_and_segments
from pangu_locmoe.data.tokenizer import StreamDecoder, Tokenizer
from pangu_locmoe.errors import DataError
from pangu_locmoe.model.cached import CachedSigma
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.capacity import DROPLESS

PIECE = 64
"""Tokens of a prompt that are computed together."""

ONE_BY_ONE = 32
"""The longest prompt that is computed token by token, without compiling anything for it."""


class Generator:
    """Samples continuations.

    A text longer than the window goes on with the last half of it, again and again.
    """

    def __init__(
        self, model: PanguSigma, config: Config, tokenizer: Tokenizer, compiled: bool = True
    ) -> None:
        """`compiled`: whether the model can be compiled as a whole; one whose experts are in
        several processes cannot.
        """
        self.config = config
        self.tokenizer = tokenizer
        windows = CachedWindows if compiled and model.tensor.size == 1 else WholeWindows
        self._logits = windows(
            model, config, tokenizer.end_of_document, compiled and config.train.mode == "graph"
        )

    def stream(
        self, prompts: Sequence[str], domains: Sequence[int], sample: SampleConfig, seed: int
    ) -> Iterator[list[str]]:
        """Yield for every step the new characters of each prompt's continuation ("" while a
        character is not complete).

        A continuation ends at the end-of-document token. It depends on its prompt and domain, on
        `sample` and `seed`, and on nothing that stands beside it.

        Args:
            prompts: texts; may be empty.
            domains: the domain id of each.
            sample: number of tokens, temperature, top-k and top-p.
            seed: fixes the draws, of each prompt alike.
        """
        length = self.config.model.seq_length
        windows = [
            [self.tokenizer.end_of_document, *self.tokenizer.encode(prompt)] for prompt in prompts
        ]
        generators = [np.random.default_rng(seed) for _ in prompts]
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
                    token = choose(logits_BV[index], sample, generators[index])
                    open_B[index] = token != self.tokenizer.end_of_document
                    if open_B[index]:
                        window.append(token)
                        piece = decoders[index].feed(token)
                    else:
                        piece = decoders[index].flush()
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
        if isinstance(self._logits, CachedWindows) and len(prompts) > 1:
            # One after another costs nothing, and takes the memory of one.
            return [
                self([prompt], [domain], sample, seed)[0]
                for prompt, domain in zip(prompts, domains)
            ]
        texts = [""] * len(prompts)
        for pieces in self.stream(prompts, domains, sample, seed):
            texts = [text + piece for text, piece in zip(texts, pieces)]
        return texts

    def _next(self, windows: list[list[int]], domains_B: np.ndarray) -> np.ndarray:
        # The vocabulary of a small corpus may be smaller than the model's table.
        return self._logits(windows, domains_B)[:, : self.tokenizer.vocab_size]


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
        logits_TV = self.model(
            tokens_BS,
            positions_BS,
            segments_BS,
            domains_B,
            (self.keys, self.keys),
            self.capacities,
            False,
        )[0]
        rows_B = Tensor(np.arange(batch, dtype=np.int32)) * length + last_B
        return self.model.vocabulary.whole(ops.gather(logits_TV, rows_B, 0))


class WholeWindows:
    """Logits of texts' next tokens by a pass over the whole window of each.

    For models whose matrices or experts are in several processes, and what the others are held
    against.
    """

    def __init__(self, model: PanguSigma, config: Config, end: int, compiled: bool) -> None:
        self.config = config
        self.end = end
        logits = NextTokenLogits(model, config)
        self._logits = ms.jit(logits) if compiled else logits

    def __call__(self, windows: list[list[int]], domains_B: np.ndarray) -> np.ndarray:
        """fp32 [B, V], of lists of 1 to S tokens."""
        tokens_BS = np.full((len(windows), self.config.model.seq_length), self.end, np.int32)
        for row, window in zip(tokens_BS, windows):
            row[: len(window)] = window
        positions_BS, segments_BS = positions_and_segments(
            tokens_BS, self.end, self.config.data.reset_at_document_end
        )
        last_B = np.asarray([len(window) - 1 for window in windows], np.int32)
        arrays = (tokens_BS, positions_BS, segments_BS, domains_B, last_B)
        return np.asarray(self._logits(*map(Tensor, arrays)).asnumpy())


class CachedWindows:
    """The same with the keys and values of what was computed before.

    A list that has grown since it was last here is continued; any other starts anew. So every
    number depends on its own list alone, bit by bit.

    Compiles once for a token and once for the pieces of a longer prompt; again for more prompts
    than before.
    """

    def __init__(self, model: PanguSigma, config: Config, end: int, compiled: bool) -> None:
        self.model = model
        self.reset = config.data.reset_at_document_end
        self.seq_length = config.model.seq_length
        self.end = end
        self.compiled = compiled
        self.piece = min(PIECE, self.seq_length)
        self._lanes: list[_Lane] = []
        self._pass: Any = None

    def __call__(self, windows: list[list[int]], domains_B: np.ndarray) -> np.ndarray:
        """fp32 [B, V], of lists of 1 to S tokens."""
        if len(windows) > len(self._lanes):
            room = -(-self.seq_length // self.piece) * self.piece
            cached = CachedSigma(self.model, len(windows), room)
            self._pass = ms.jit(cached) if self.compiled else cached
            self._lanes = [_Lane(window) for window in windows]
        for index, (window, domain) in enumerate(zip(windows, domains_B)):
            if self._lanes[index].window is not window:
                self._lanes[index] = _Lane(window)
            if self._lanes[index].done < len(window):
                self._extend(index, self._lanes[index], int(domain))
        return np.stack([lane.logits_V for lane in self._lanes[: len(windows)]])

    def _extend(self, index: int, lane: _Lane, domain: int) -> None:
        """Compute what a lane's window has more than its caches."""
        length = len(lane.window)
        width = self.piece if lane.done == 0 and length > ONE_BY_ONE else 1
        positions_1S, _ = positions_and_segments(
            np.asarray([lane.window], np.int32), self.end, self.reset
        )
        for start in range(lane.done, length, width):
            tokens_T = np.full(width, self.end, np.int32)
            positions_T = np.zeros(width, np.int32)
            count = min(width, length - start)
            tokens_T[:count] = lane.window[start : start + count]
            positions_T[:count] = positions_1S[0, start : start + count]
            slots_T = np.arange(start, start + width, dtype=np.int32)
            places = (np.asarray([number], np.int32) for number in (domain, index, count - 1))
            logits_1V = self._pass(*map(Tensor, (tokens_T, positions_T, slots_T, *places)))
        lane.logits_V = logits_1V.asnumpy()[0]
        lane.done = length


@dataclass
class _Lane:
    """What the caches hold of a window: its first `done` tokens. The logits are those after them."""

    window: list[int]
    done: int = 0
    logits_V: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))


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


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 file, one a line. Raises DataError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"--prompts {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"--prompts {path}: must be UTF-8") from None
    if not text:
        raise DataError(f"--prompts {path}: has no line; must have one for each prompt")
    return text.removesuffix("\n").split("\n")
