"""Times `prepare` against datasets.map with the same tokenizer on the same text.

Both read the same JSON lines and are processes of their own, one after the other in each round, with
a worker for each core. `prepare` also removes copies, holds near-copies out together, checks that
every id gives its text back, counts what docs/data.md says, and packs; datasets.map tokenizes.
`bash scripts/benchmark_prepare.sh` sets up what this needs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

from benchmark.hf import Parser, count

VOCABULARY = 8192
_BLOCK = 20
"""Lines that stay together where text is drawn."""


def draw_text(output: Path, megabytes: int, seed: int) -> int:
    """Write documents made of random blocks of the Python files of this installation.

    Returns the bytes of their text.
    """
    rng = random.Random(seed)
    blocks: List[str] = []
    for folder in map(Path, sys.path):
        files = sorted(folder.rglob("*.py")) if folder.is_dir() else []
        for file in files:
            lines = file.read_text(encoding="utf-8", errors="ignore").splitlines(keepends=True)
            blocks += ["".join(lines[i : i + _BLOCK]) for i in range(0, len(lines), _BLOCK)]
    size = 0
    with output.open("w", encoding="utf-8") as out:
        while size < megabytes * 1e6:
            text = "".join(rng.choices(blocks, k=rng.randint(1, 12)))
            size += len(text.encode("utf-8"))
            out.write(json.dumps({"text": text}) + "\n")
    return size


def text_bytes(file: Path) -> int:
    """Bytes of text in JSON lines."""
    with file.open(encoding="utf-8") as lines:
        return sum(len(json.loads(line)["text"].encode("utf-8")) for line in lines)


def train_tokenizer(text: Path, output: Path) -> None:
    """On the first 10 MB."""
    from pangu_locmoe.data.tokenizer import Tokenizer

    def sample() -> Iterator[str]:
        left = 10_000_000
        with text.open(encoding="utf-8") as lines:
            for line in lines:
                document = json.loads(line)["text"]
                left -= len(document)
                if left < 0:
                    return
                yield document

    Tokenizer.train(sample(), VOCABULARY).save(output)


def prepare_text(text: Path, tokenizer: Path, folder: Path, workers: int) -> None:
    """Our side."""
    from pangu_locmoe.config import parse_config
    from pangu_locmoe.data.prepared import prepare

    config = parse_config(
        {
            "model": {"vocab_size": VOCABULARY, "seq_length": 256},
            "data": {
                "sources": [{"path": str(text), "domain": "text"}],
                "prepared_dir": str(folder),
                "tokenizer": str(tokenizer),
                "workers": workers,
            },
        }
    )
    prepare(config)


def map_text(text: Path, tokenizer: Path, folder: Path, workers: int) -> None:
    """The other side: ids alone, by the fastest call that tokenizers has."""
    import datasets
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(tokenizer))

    def encode(batch: Dict[str, List[str]]) -> Dict[str, List[List[int]]]:
        encoded = backend.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"input_ids": [one.ids for one in encoded]}

    data = datasets.load_dataset(
        "json", data_files=str(text), split="train", cache_dir=str(folder), num_proc=workers
    )
    data.map(encode, batched=True, num_proc=workers, remove_columns=["text"])


SIDES: Dict[str, Callable[[Path, Path, Path, int], None]] = {
    "prepare": prepare_text,
    "datasets.map": map_text,
}


def timed(side: str, text: Path, tokenizer: Path, workers: int) -> Dict[str, float]:
    """Run a side in a process of its own, start included: seconds of wall time, and of all
    processors.
    """
    with tempfile.TemporaryDirectory(dir=text.parent) as folder:
        command = [sys.executable, "-m", "benchmark.prepare", "--side", side]
        command += ["--text", str(text), "--workers", str(workers)]
        command += ["--tokenizer", str(tokenizer), "--folder", folder]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        environment = {
            **os.environ,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": folder,
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr.strip().splitlines()[-1:]}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": used}


def measure(text: Path, tokenizer: Path, rounds: int, workers: int) -> Dict[str, Any]:
    """All rounds of both sides, each of which begins every other one."""
    size = text_bytes(text)
    result: Dict[str, Any] = {"bytes": size, "workers": workers, "rounds": []}
    for turn in range(rounds):
        order = list(SIDES) if turn % 2 == 0 else list(SIDES)[::-1]
        row = {side: timed(side, text, tokenizer, workers) for side in order}
        result["rounds"].append(row)
        parts = ", ".join(
            f"{side} {size / 1e6 / row[side]['seconds']:.2f} MB/s "
            f"({row[side]['cpu_seconds']:.0f} s of processors)"
            for side in SIDES
        )
        print(f"round {turn + 1}: {parts}", flush=True)
    for kind in ("seconds", "cpu_seconds"):
        ratios = [row["datasets.map"][kind] / row["prepare"][kind] for row in result["rounds"]]
        result[f"speed by {kind}"] = statistics.median(ratios)
    print(
        f"{size / 1e6:,.0f} MB, {workers} workers: prepare is {result['speed by seconds']:.2f} times "
        f"as fast as datasets.map (median), {result['speed by cpu_seconds']:.2f} by processor time"
    )
    return result


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the flags."""
    parser = Parser(str(__doc__).splitlines()[0])
    parser.add_argument("--megabytes", type=count, default=100, help="text to draw")
    parser.add_argument("--rounds", type=count, default=3, help="each side runs once in each")
    parser.add_argument(
        "--workers", type=count, default=len(os.sched_getaffinity(0)), help="of each side"
    )
    parser.add_argument("--text", type=Path, default=None, help="JSON lines in its place")
    parser.add_argument("--output", type=Path, default=None, help="everything, to this JSON file")
    parser.add_argument("--check", action="store_true", help="read the flags and end")
    parser.add_argument("--side", choices=SIDES, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> int:
    """Draw text, train a tokenizer on it, measure, print, write."""
    arguments = parse_arguments()
    if arguments.check:
        return 0
    if arguments.side is not None:
        SIDES[arguments.side](
            arguments.text, arguments.tokenizer, arguments.folder, arguments.workers
        )
        return 0
    with tempfile.TemporaryDirectory() as folder:
        text = arguments.text
        if text is None:
            text = Path(folder) / "text.jsonl"
            draw_text(text, arguments.megabytes, seed=1)
        tokenizer = Path(folder) / "tokenizer.json"
        train_tokenizer(text, tokenizer)
        result = measure(text.resolve(), tokenizer, arguments.rounds, arguments.workers)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
