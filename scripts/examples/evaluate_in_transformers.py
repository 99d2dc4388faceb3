"""Bits per byte of texts by an exported model in Transformers, and how it goes on: `python
scripts/examples/evaluate_in_transformers.py DIR [TEXT ...]`.

DIR is what `pangu-locmoe export` wrote; TEXT are files, without any this clone's README. Needs the
extra `export`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def main(folder: str, texts: list[str]) -> None:
    # Here, because a test imports every script, with the extra or without.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    window = model.config.max_position_embeddings
    for file in texts or [str(README)]:
        text = Path(file).read_text(encoding="utf-8")
        ids_1S = torch.tensor([tokenizer(text)["input_ids"]])  # begins with <eod>
        nats = 0.0
        for start in range(0, ids_1S.shape[1] - 1, window):
            # The last token of a window is the first of the next: each is a target once.
            part_1S = ids_1S[:, start : start + window + 1]
            with torch.no_grad():
                logits_SV = model(part_1S[:, :-1]).logits[0]
            nats += torch.nn.functional.cross_entropy(
                logits_SV, part_1S[0, 1:], reduction="sum"
            ).item()
        print(f"{nats / math.log(2) / len(text.encode()):.4f} bits per byte: {file}")
    prompt = tokenizer("The router ", return_tensors="pt")
    ids_1S = model.generate(prompt["input_ids"], max_new_tokens=12, do_sample=False)
    print(tokenizer.decode(ids_1S[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
