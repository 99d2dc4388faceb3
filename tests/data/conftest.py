from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import pytest
from support.texts import WORDS, make_text

from pangu_locmoe.config import Config
from pangu_locmoe.data.tokenizer import Tokenizer


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
    def make(
        sources: Any = None, vocab_size: int = 400, seq_length: int = 32, **data: Any
    ) -> Config:
        if sources is None:
            sources = [(corpus / "en", "en"), (corpus / "zh", "zh")]
        values = {
            "sources": [{"path": str(p), "domain": d} for p, d in sources],
            "prepared_dir": str(tmp_path / "prepared"),
            **data,
        }
        return Config.model_validate(
            {"data": values, "model": {"vocab_size": vocab_size, "seq_length": seq_length}}
        )

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([make_text(domain, i) for domain in WORDS for i in range(10)], 400)
