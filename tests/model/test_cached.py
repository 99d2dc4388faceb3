"""A text that grows, with keys and values kept, against passes over whole windows."""

from __future__ import annotations

import numpy as np
import pytest
from support import tiny

from pangu_locmoe import generate
from pangu_locmoe.config import Config
from pangu_locmoe.generate import CachedWindows, WholeWindows
from pangu_locmoe.model.sigma import PanguSigma

END = 0
CASES = {
    "dense": {"model": {"num_moe_layers": 0}},
    "hash": {"moe": {"router": "hash"}},
    "switch": {  # two of its experts, and a shared one
        "moe": {"router": "switch", "top_k": 2, "weight": "normalized", "shared_experts": 1}
    },
    "locmoe": {  # with a prior and a bias
        "moe": {"router": "locmoe", "token_prior": 1.0, "node_groups": 2, "balance": "quantile"}
    },
    "local_hash": {"moe": {"router": "local_hash", "node_groups": 2, "levels": 1}},
    "several experts": {
        "moe": {
            "router": "locmoe_plus",
            "num_experts": 8,
            "token_choice": {"threshold": 0.5, "max_experts": 3},
        }
    },
    "groups of experts": {
        "model": {"domain_embeddings": True},
        "moe": {"router": "switch", "levels": 2, "num_experts": 6},
    },
    "a user's": {"moe": {"router": "support.own_routers:Bare"}},
    "no final norm": {"model": {"final_norm": False, "num_moe_layers": 2}},
    "one document": {"data": {"reset_at_document_end": False}},
    "an odd window": {"model": {"seq_length": 27}},
}


def built(case: str) -> tuple[Config, PanguSigma]:
    sections = CASES[case]
    model = {"init_std": 0.1, **sections.get("model", {})}
    config = tiny.tiny_config(**{**sections, "model": model})
    return config, PanguSigma(config)


def tokens(seed: int, count: int) -> list[int]:
    """Text with an end of a document in the middle of it."""
    text = np.random.default_rng(seed).integers(1, 400, count)
    text[count // 2] = END
    return [END, *text.tolist()[1:]]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_whole_window(monkeypatch, case):
    """After a prompt computed in pieces, and after tokens up to the last of the window."""
    monkeypatch.setattr(generate, "PIECE", 8)
    monkeypatch.setattr(generate, "ONE_BY_ONE", 16)
    config, model = built(case)
    cached = CachedWindows(model, config, END, False)
    whole = WholeWindows(model, config, END, False)
    length = config.model.seq_length
    domains_B = np.array([1, 2], np.int32)
    texts = [tokens(1, length), tokens(2, length)]
    windows = [texts[0][:18], texts[1][:3]]
    while len(windows[0]) < length:
        for window, text in zip(windows, texts):
            window.append(text[len(window)])
        logits_BV = cached(windows, domains_B)
        if len(windows[0]) % 4 == 3 or len(windows[0]) == length:
            np.testing.assert_allclose(logits_BV, whole(windows, domains_B), atol=1e-5, rtol=1e-5)


def test_half_precision():
    """Keys and values are kept as they are computed, to fp16's three digits."""
    sections = {"model": {"init_std": 0.1}, "train": {"precision": "fp16"}}
    config = tiny.tiny_config(**sections)
    model = PanguSigma(config)
    texts = [tokens(6, 12)]
    domains_B = np.zeros(1, np.int32)
    np.testing.assert_allclose(
        CachedWindows(model, config, END, False)(texts, domains_B),
        WholeWindows(model, config, END, False)(texts, domains_B),
        atol=5e-3,
    )


def test_a_text_does_not_feel_what_stands_beside_it(monkeypatch):
    """Bit by bit, alone and in any place beside others, of this call or of earlier ones."""
    monkeypatch.setattr(generate, "ONE_BY_ONE", 16)
    config, model = built("several experts")
    domains_B = np.zeros(3, np.int32)

    def texts() -> list[list[int]]:
        return [tokens(3, 5), tokens(4, 30), tokens(5, 18)]

    alone = [CachedWindows(model, config, END, False)([text], domains_B[:1])[0] for text in texts()]
    cached = CachedWindows(model, config, END, False)
    for order in ([0, 1, 2], [2, 0, 1], [1], [1, 1, 0]):
        windows = [list(texts()[index]) for index in order]
        together = cached(windows, domains_B[: len(order)])
        np.testing.assert_array_equal(together, np.stack([alone[index] for index in order]))


def test_the_model_stays_as_it_was():
    config, model = built("switch")
    before = {name: value.asnumpy().copy() for name, value in model.parameters_dict().items()}
    CachedWindows(model, config, END, False)([[END, 5, 7]], np.zeros(1, np.int32))
    after = {name: value.asnumpy() for name, value in model.parameters_dict().items()}
    assert list(before) == list(after) == [value.name for value in model.get_parameters()]
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name])
