"""Builds a prepared folder: one reading to decide, one for the tokenizer, one of each side that
tokenizes and counts.
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
from typing import Any

import numpy as np
from tqdm import tqdm

from pangu_locmoe.config import Config
from pangu_locmoe.data.bigram import CONTEXTS, bits_per_byte, count_bigrams
from pangu_locmoe.data.copies import CopiedRuns
from pangu_locmoe.data.corpus import SPLITS, Corpus, corpus_files, scan
from pangu_locmoe.data.identity import TextDigest, tokenizer_digest
from pangu_locmoe.data.packing import Packer
from pangu_locmoe.data.records import RecordWriter
from pangu_locmoe.data.tokenizer import Tokenizer
from pangu_locmoe.errors import DataError
from pangu_locmoe.files import json_text

_TOKENIZER_BYTES = 10_000_000
"""Text the tokenizer is trained on, in equal parts from each domain; more changes little and
takes longer.
"""
_CHUNK_BYTES = 1_000_000
"""Text tokenized at a time: enough for all processors, little enough for the memory."""
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
    except OSError as error:
        raise DataError(
            f"data.prepared_dir: {path.parent}: cannot be written: {error.strerror}"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_soon_done(config: Config) -> bool:
    paths = [path for _, path in corpus_files(config.data)]
    zipped = any(path.suffix.lower() == ".gz" for path in paths)  # which may hold anything
    return not zipped and sum(path.stat().st_size for path in paths) <= _SOON_BYTES


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
    corpus = scan(config.data, config.domains)
    tokenizer = _tokenizer(config, corpus)
    tokenizer.save(folder / "tokenizer.json")
    runs = CopiedRuns([corpus.report.bytes["validation"][name] for name in corpus.domains])
    sides = {
        (i, split): _Side(config, tokenizer, folder, i, split, runs)
        for i in range(len(corpus.domains))
        for split in SPLITS
    }
    total = sum(sum(counts.values()) for counts in corpus.report.bytes.values())
    with tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc="tokenizing",
        disable=None if progress else True,
        leave=False,
    ) as bar:
        for split in (
            "validation",
            "train",
        ):  # what is looked for comes before what it is looked for in
            for domain, _, pieces in corpus.documents(split):
                bar.update(sides[domain, split].add(pieces))
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


def _tokenizer(config: Config, corpus: Corpus) -> Tokenizer:
    if config.data.tokenizer is not None:
        return Tokenizer.load(config.data.tokenizer, config.model.vocab_size)

    def sample() -> Iterator[str]:
        # Only training documents: a vocabulary that has seen the held-out text would flatter the
        # model.
        for _domain, _split, pieces in corpus.documents(
            "train", _TOKENIZER_BYTES // len(corpus.domains)
        ):
            yield from pieces

    return Tokenizer.train(sample(), config.model.vocab_size)


class _Side:
    """One split of one domain on its way from text to records."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        folder: Path,
        domain: int,
        split: str,
        runs: CopiedRuns,
    ) -> None:
        self.domain = domain
        self.split = split
        self.documents = self.bytes = 0
        self.digest = TextDigest()
        self.document_starts = np.empty(0, np.int64)
        """Place in the stream of each document's `<eod>`."""
        self.bigrams = np.zeros((CONTEXTS, 256), np.int64)
        self.token_counts = np.zeros(config.model.vocab_size, np.int64)
        self.packer = Packer(config.model.seq_length, tokenizer.end_of_document)
        # Numbers, not names, because a domain may be called anything.
        self.writer = RecordWriter(folder, f"{split}-{domain}", domain)
        self.unused_tokens = 0
        self._tokenizer = tokenizer
        self._runs = runs
        self._waiting: list[str] = []
        self._waiting_contents: list[bytes] = []
        self._waiting_firsts: list[int] = []
        self._waiting_bytes = 0

    def add(self, pieces: list[str]) -> int:
        """Take one document; returns its bytes."""
        contents = [piece.encode("utf-8") for piece in pieces]
        size = sum(map(len, contents))
        self.documents += 1
        self.bytes += size
        self.digest.add(contents)
        self._waiting_firsts.append(len(self._waiting))
        self._waiting += pieces
        self._waiting_contents += contents
        self._waiting_bytes += size
        if self._waiting_bytes >= _CHUNK_BYTES:
            self._flush()
        return size

    def close(self) -> None:
        self._flush()
        if self.split == "validation" and self.packer.sequences == 0:
            self.writer.write(self.packer.pad())
        self.unused_tokens = self.packer.unused_tokens
        self.writer.close()

    def _flush(self) -> None:
        if not self._waiting:
            return
        ids = [
            np.array(document, np.int32) for document in self._tokenizer.encode_batch(self._waiting)
        ]
        self.token_counts += np.bincount(np.concatenate(ids), minlength=len(self.token_counts))
        self.token_counts[self._tokenizer.end_of_document] += len(ids)
        self.bigrams += count_bigrams(self._waiting_contents)
        starts = self.packer.tokens + np.cumsum([0, *(len(document) + 1 for document in ids)])
        self.document_starts = np.concatenate([self.document_starts, starts[self._waiting_firsts]])
        if self.split == "validation":
            self._runs.hold(self.domain, self._waiting_contents, ids)
        else:
            self._runs.search(ids, self._tokenizer.end_of_document)
        self.writer.write(self.packer.add(ids))
        self._waiting = []
        self._waiting_contents = []
        self._waiting_firsts = []
        self._waiting_bytes = 0


def _check_enough(domain: str, side: _Side) -> None:
    if side.packer.sequences == 0:
        bytes_per_token = max(side.bytes, 1) / max(side.packer.tokens, 1)
        needed = int((side.packer.seq_length + 1) * bytes_per_token) + 1
        raise DataError(
            f"data.sources: domain {domain} has {side.bytes} bytes of training text, not "
            "enough for one sequence "
            f"of model.seq_length ({side.packer.seq_length}) tokens; about {needed} are needed"
        )


def _check_held_out(config: Config, domain: str, side: _Side) -> None:
    if side.documents == 0:
        data = config.data
        raise DataError(
            f"data.validation_fraction = {data.validation_fraction}: leaves domain "
            f"{domain} no byte of validation text, of which "
            f"data.max_bytes_per_domain = {data.max_bytes_per_domain} gives it that share; "
            "raise one of them"
        )


def _identity(
    config: Config, corpus: Corpus, sides: dict[tuple[int, str], _Side], folder: Path
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
    sides: dict[tuple[int, str], _Side],
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


def _counts(side: _Side) -> dict[str, int]:
    return {
        "documents": side.documents,
        "bytes": side.bytes,
        "tokens": side.packer.tokens,
        "sequences": side.packer.sequences,
        "unused_tokens": side.unused_tokens,
    }


if __name__ == "__main__":
    sys.exit(_serve())
