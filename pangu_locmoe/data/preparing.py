"""Builds a prepared folder: one reading to decide, one for the tokenizer, one of each side that
tokenizes and counts.

This process reads and writes; hashing and tokenizing is done by others (workers.py), and comes back in
the order of the text, so that what is written does not depend on how many there are.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, Optional

import numpy as np
from tqdm import tqdm

from pangu_locmoe.config import Config
from pangu_locmoe.data.bigram import CONTEXTS, bits_per_byte
from pangu_locmoe.data.copies import CopiedRuns
from pangu_locmoe.data.corpus import SPLITS, Corpus, SourceFile, corpus_files, scan
from pangu_locmoe.data.identity import tokenizer_digest
from pangu_locmoe.data.sides import Side, take, tokenize
from pangu_locmoe.data.tokenizer import Tokenizer
from pangu_locmoe.data.workers import Workers
from pangu_locmoe.errors import DataError
from pangu_locmoe.files import json_text

_TOKENIZER_BYTES = 10_000_000
"""Text the tokenizer is trained on, in equal parts from each domain; more changes little and
takes longer.
"""
_RESUMED_BYTES = 64_000_000
"""Text of which what is done is kept when it is interrupted, so that the next start goes on."""
_PACKED = (".gz", ".parquet", ".parq")
_ZIPPED = 4
"""How much text a byte of these may well be."""
_SOON_BYTES = 1_000_000
"""Text that is prepared before another process would have started."""
_REFUSED = 2
"""Exit code of that process where what it wrote is a DataError's text."""


def build(config: Config, path: Path, progress: bool) -> None:
    """Make the folder `path`; it appears whole or not at all.

    Raises DataError if corpus, tokenizer or disk refuse.

    A corpus of some size is prepared by a process of its own: the libraries that train the
    tokenizer and write the files do not hear of Ctrl-C, but a process can be ended at any time.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise DataError(
            f"data.prepared_dir: {path.parent}: cannot be written: {error.strerror}"
        ) from None
    try:
        (_fill if _is_soon_done(config) else _fill_apart)(config, temporary, progress)
        temporary.chmod(0o755)
        _publish(temporary, path)
        shutil.rmtree(_kept_in(path), ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"data.prepared_dir: {path.parent}: cannot be written: {error.strerror}"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_soon_done(config: Config) -> bool:
    files = corpus_files(config.data)
    zipped = any(file.path.suffix.lower() == ".gz" for file in files)  # which may hold anything
    return not zipped and _text_bytes(files) <= _SOON_BYTES


def _text_bytes(files: list[SourceFile]) -> int:
    """About how much text there is."""
    return sum(
        file.path.stat().st_size * (_ZIPPED if file.path.suffix.lower() in _PACKED else 1)
        for file in files
    )


def _kept_in(path: Path) -> Path:
    """Where what is done of a folder is kept until it is whole."""
    return path.parent / f".{path.name}.parts"


def _workers(config: Config, folder: Path) -> Workers:
    """As many as are worth starting; `folder`: the temporary one, .NAME.RANDOM."""
    size = _text_bytes(corpus_files(config.data))
    count = config.data.workers or len(os.sched_getaffinity(0))
    keep = None
    if size >= _RESUMED_BYTES:
        keep = folder.with_suffix(".parts")
        keep.mkdir(exist_ok=True)
    return Workers(count if size > _SOON_BYTES else 1, keep)


def _fill_apart(config: Config, folder: Path, progress: bool) -> None:
    """`_fill` in a process of its own, which ends when this one is interrupted or ends."""
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "pangu_locmoe.data.preparing"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(pickle.dumps((config, folder, progress)))
        process.stdin.flush()  # and left open: its end is this process's end
        answer = process.stdout.read().decode("utf-8")
        code = process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    if code == _REFUSED:
        raise DataError(answer)
    if code < 0:
        raise DataError(
            "the process that prepares the data was ended by "
            f"{signal.Signals(-code).name}; is the memory full?"
        )
    if code:
        raise RuntimeError(
            f"the process that prepares the data failed with exit code {code}; see above"
        )


def _serve() -> int:
    """What that process does: read `_fill`'s arguments from stdin, run it, and write what it
    refuses to stdout.
    """
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches both; the one that waits ends this one
    answer, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed
    config, folder, progress = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _fill(config, folder, progress)
    except (DataError, OSError) as error:
        text = (
            str(error)
            if isinstance(error, DataError)
            else f"data.prepared_dir: {folder.parent}: cannot be written: {error.strerror}"
        )
        answer.buffer.write(text.encode("utf-8"))
        answer.flush()
        return _REFUSED
    return 0


def _end_with_parent() -> None:
    while os.read(0, 1):  # not through sys.stdin, whose lock would be held when this process ends
        pass
    os._exit(1)


def _publish(temporary: Path, path: Path) -> None:
    if path.exists() and not (path / "prepared.json").is_file():
        shutil.rmtree(path)  # an empty or half-deleted folder
    try:
        temporary.rename(path)  # refuses to replace what another process has just finished
    except OSError:
        if not (path / "prepared.json").is_file():
            raise


def _fill(config: Config, folder: Path, progress: bool) -> None:
    with _workers(config, folder) as workers:
        _fill_with(workers, config, folder, progress)


def _fill_with(workers: Workers, config: Config, folder: Path, progress: bool) -> None:
    given = None
    if config.data.tokenizer is not None:
        given = Tokenizer.load(config.data.tokenizer, config.model.vocab_size)
    with _bar("reading", None, progress) as bar:
        corpus = scan(config.data, config.domains, given, workers, bar.update, folder)
    tokenizer = given or _train_tokenizer(config, corpus)
    tokenizer.save(folder / "tokenizer.json")
    runs = CopiedRuns([corpus.report.bytes["validation"][name] for name in corpus.domains])
    queue = workers.queue(tokenize, take)
    sides = {
        (i, split): Side(config, tokenizer, folder, i, split, runs, queue)
        for i in range(len(corpus.domains))
        for split in SPLITS
    }
    total = sum(sum(counts.values()) for counts in corpus.report.bytes.values())
    with _bar("tokenizing", total, progress) as bar:
        for split in (
            "validation",
            "train",
        ):  # what is looked for comes before what it is looked for in
            for domain, _, pieces in corpus.documents(split):
                bar.update(sides[domain, split].add(pieces))
            for domain in range(len(corpus.domains)):
                sides[domain, split].hand_over()
            queue.finish()
            for domain in range(len(corpus.domains)):
                sides[domain, split].close()
    for domain, name in enumerate(corpus.domains):
        _check_enough(name, sides[domain, "train"])
        _check_held_out(config, name, sides[domain, "validation"])
        np.save(
            folder / f"validation-{domain}-documents.npy",
            sides[domain, "validation"].document_starts,
        )
    np.save(
        folder / "token_counts.npy",
        np.stack([sides[i, "train"].token_counts for i in range(len(corpus.domains))]),
    )
    description = {
        "identity": _identity(config, corpus, sides, folder),
        **_describe(config, corpus, tokenizer, sides, runs),
    }
    (folder / "prepared.json").write_text(
        json_text(description, indent=1, ascii_only=False) + "\n", encoding="utf-8"
    )


def _bar(name: str, total: Optional[int], progress: bool) -> tqdm[NoReturn]:
    """MB of text, MB/s, and with a total the time left."""
    return tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc=name,
        disable=None if progress else True,
        leave=False,
    )


def _train_tokenizer(config: Config, corpus: Corpus) -> Tokenizer:
    def sample() -> Iterator[str]:
        # Only training documents: a vocabulary that has seen the held-out text would flatter the
        # model.
        for _domain, _split, pieces in corpus.documents(
            "train", _TOKENIZER_BYTES // len(corpus.domains)
        ):
            for piece in pieces:
                assert isinstance(piece, str)  # ids need a tokenizer that is given
                yield piece

    return Tokenizer.train(sample(), config.model.vocab_size)


def _check_enough(domain: str, side: Side) -> None:
    if side.packer.sequences == 0:
        bytes_per_token = max(side.bytes, 1) / max(side.packer.tokens, 1)
        needed = int((side.packer.seq_length + 1) * bytes_per_token) + 1
        raise DataError(
            f"data.sources: domain {domain} has {side.bytes} bytes of training text, not "
            "enough for one sequence "
            f"of model.seq_length ({side.packer.seq_length}) tokens; about {needed} are needed"
        )


def _check_held_out(config: Config, domain: str, side: Side) -> None:
    if side.documents == 0:
        data = config.data
        raise DataError(
            f"data.validation_fraction = {data.validation_fraction}: leaves domain "
            f"{domain} no byte of validation text, of which "
            f"data.max_bytes_per_domain = {data.max_bytes_per_domain} gives it that share; "
            "raise one of them"
        )


def _identity(
    config: Config, corpus: Corpus, sides: dict[tuple[int, str], Side], folder: Path
) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer_digest(folder / "tokenizer.json"),
        "seq_length": config.model.seq_length,
        "text": {
            name: {split: sides[i, split].digest.hexdigest() for split in SPLITS}
            for i, name in enumerate(corpus.domains)
        },
    }


def _describe(
    config: Config,
    corpus: Corpus,
    tokenizer: Tokenizer,
    sides: dict[tuple[int, str], Side],
    runs: CopiedRuns,
) -> dict[str, Any]:
    training = sum(
        (side.bigrams for (_, split), side in sides.items() if split == "train"),
        np.zeros((CONTEXTS, 256), np.int64),
    )
    held_out = {name: sides[i, "validation"].bigrams for i, name in enumerate(corpus.domains)}
    held_out["all"] = sum(held_out.values(), np.zeros((CONTEXTS, 256), np.int64))
    return {
        "domains": list(corpus.domains),
        "seq_length": config.model.seq_length,
        "vocab_size": config.model.vocab_size,
        "token_counts": "token_counts.npy",
        "bigram_bits_per_byte": {
            name: bits_per_byte(training, counts) for name, counts in held_out.items()
        },
        "counts": {
            split: {name: _counts(sides[i, split]) for i, name in enumerate(corpus.domains)}
            for split in SPLITS
        },
        "files": {
            split: [
                [file.name for file in sides[i, split].writer.files]
                for i in range(len(corpus.domains))
            ]
            for split in SPLITS
        },
        "copies": {
            name: {"searched": searched, "copied": copied}
            for name, (searched, copied) in zip(corpus.domains, runs.counts())
        },
        "tokenizer_switched_off": tokenizer.switched_off,
        "report": corpus.report.to_dict(),
    }


def _counts(side: Side) -> dict[str, int]:
    return {
        "documents": side.documents,
        "bytes": side.bytes,
        "tokens": side.packer.tokens,
        "sequences": side.packer.sequences,
        "unused_tokens": side.unused_tokens,
    }


if __name__ == "__main__":
    sys.exit(_serve())
