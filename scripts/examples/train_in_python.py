"""Train a small LocMoE model from Python, evaluate it, let it write: `python
scripts/examples/train_in_python.py [TEXT ...]`.

TEXT are files, folders or globs, a domain each; without any, this clone's documentation and code
are read.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from pangu_locmoe.checkpoint.restore import restore_generator
from pangu_locmoe.config import SampleConfig, load_config
from pangu_locmoe.train.evaluate import evaluate_checkpoint, format_evaluation
from pangu_locmoe.train.run import train

HERE = Path(__file__).resolve().parent
OWN_TEXT = [str(HERE.parents[1] / name) for name in ("docs/*.md", "pangu_locmoe/*/*.py")]


def main(texts: list[str]) -> None:
    work = Path(tempfile.mkdtemp(prefix="train-in-python-"))
    sources = [{"path": text, "domain": f"text {n}"} for n, text in enumerate(texts or OWN_TEXT)]
    values = {"data.sources": sources, "data.prepared_dir": str(work / "prepared")}
    config = load_config(HERE / "tiny.yaml", values)
    train(config, work / "run", progress=False)

    figures = evaluate_checkpoint(work / "run")
    print(format_evaluation(figures, figures["bigram_bits_per_byte"]))
    write = restore_generator(work / "run")
    prompt = "The router "
    domain = 0
    print(prompt + write([prompt], [domain], SampleConfig(tokens=24), seed=1)[0])


if __name__ == "__main__":
    main(sys.argv[1:])
