"""Small texts of two domains."""

from __future__ import annotations

import random

WORDS = {
    "en": [
        "the",
        "expert",
        "router",
        "sends",
        "every",
        "token",
        "to",
        "one",
        "node",
        "of",
        "the",
        "cluster",
        "and",
        "back",
        "again",
    ],
    "zh": [
        "专家",
        "路由",
        "每个",
        "词元",
        "送往",
        "节点",
        "集群",
        "中国",
        "语言",
        "模型",
        "训练",
        "数据",
    ],
}


def make_text(domain: str, seed: int, words: int = 300) -> str:
    """A text of a domain that no other seed gives."""
    rng = random.Random(f"{domain}{seed}")
    separator = " " if domain == "en" else ""
    return f"{seed}\n" + "\n".join(
        separator.join(rng.choices(WORDS[domain], k=20)) for _ in range(words // 20)
    )
