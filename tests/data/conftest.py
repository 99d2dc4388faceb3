from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Callable

import pytest

from pangu_locmoe.config import Config
from pangu_locmoe.data.tokenizer import Tokenizer

WORDS = {
    "en": ["the", "expert", "router", "sends", "every", "token", "to", "one", "node", "of", "the", "cluster", "and", "back", "again"],
    "zh": ["专家", "路由", "每个", "词元", "送往", "节点", "集群", "中国", "语言", "模型", "训练", "数据"],
}


def make_text(domain: str, seed: int, words: int = 300) -> str:
    """A text of a domain that no other seed gives."""
    rng = random.Random(f"{domain}{seed}")
    separator = " " if domain == "en" else ""
    return f"{seed}\n" + "\n".join(separator.join(rng.choices(WORDS[domain], k=20)) for _ in range(words // 20))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Folders en and zh of 30 text files each."""
    for domain in WORDS:
        folder = tmp_path / "corpus" / domain
        folder.mkdir(parents=True)
        for i in range(30):
            (folder / f"{i:02d}.txt").write_text(make_text(domain, i), encoding="utf-8")
    return tmp_path / "corpus"


@pytest.fixture
def make_config(tmp_path: Path, corpus: Path) -> Callable[..., Config]:
    def make(sources: Any = None, vocab_size: int = 400, seq_length: int = 32, **data: Any) -> Config:
        if sources is None:
            sources = [(corpus / "en", "en"), (corpus / "zh", "zh")]
        values = {"sources": [{"path": str(p), "domain": d} for p, d in sources], "prepared_dir": str(tmp_path / "prepared"), **data}
        return Config.model_validate({"data": values, "model": {"vocab_size": vocab_size, "seq_length": seq_length}})

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([make_text(domain, i) for domain in WORDS for i in range(10)], 400)
