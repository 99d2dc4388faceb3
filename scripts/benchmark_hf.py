"""The Hugging Face side of the speed comparison: MixtralForCausalLM training steps on the CPU, driven line by line.

The process prints one line ``ready {json}`` after its first step. Then it reads lines from standard input: ``run N`` trains N
steps and answers with one JSON line; ``quit`` or the end of the input ends it. A driver can so interleave it with another
trainer on the same machine, which is the only fair way to compare on shared cores. Needs torch and transformers, not MindSpore.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from typing import Any


def parse_arguments() -> argparse.Namespace:
    """Read the flags; the defaults are the comparison of docs: 4 layers of 8 experts, top-1, 4 x 256 tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers, every one with experts (default: 4)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (default: 256)")
    parser.add_argument("--heads", type=int, default=4, help="attention heads (default: 4)")
    parser.add_argument(
        "--intermediate", type=int, default=688, help="SwiGLU width; 688 has the parameters of a two-matrix MLP of 1,024 (default: 688)"
    )
    parser.add_argument(
        "--experts", type=int, default=8, help="experts in each layer, top-1; 0 builds the dense twin, a Mistral (default: 8)"
    )
    parser.add_argument("--vocabulary", type=int, default=4096, help="vocabulary size (default: 4096)")
    parser.add_argument("--sequence", type=int, default=256, help="tokens in a sequence (default: 256)")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a batch (default: 4)")
    parser.add_argument(
        "--implementation",
        default="grouped_mm",
        choices=["grouped_mm", "batched_mm", "eager"],
        help="how the experts run (default: grouped_mm)",
    )
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="constant learning rate (default: 3e-4)")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and tokens (default: 1)")
    return parser.parse_args()


def build_model(arguments: argparse.Namespace) -> Any:
    """Build the causal language model in float32 from the flags; with ``--experts 0`` its dense twin."""
    from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

    shape = {
        "vocab_size": arguments.vocabulary,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.heads,
        "max_position_embeddings": arguments.sequence,
        "sliding_window": None,
        "use_cache": False,
        "tie_word_embeddings": False,
    }
    if arguments.experts == 0:
        return MistralForCausalLM(MistralConfig(**shape))
    config = MixtralConfig(
        **shape,
        num_local_experts=arguments.experts,
        num_experts_per_tok=1,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
    )
    config._experts_implementation = arguments.implementation
    model = MixtralForCausalLM(config)
    set_implementation = getattr(model, "set_experts_implementation", None)
    if set_implementation is not None:
        set_implementation(arguments.implementation)
    return model


class Trainer:
    """One model, one fused AdamW, endless random batches of shape [batch, sequence]."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import torch

        torch.set_num_threads(arguments.threads)
        torch.manual_seed(arguments.seed)
        self.torch = torch
        self.model = build_model(arguments).to(torch.float32).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        shape = (8, arguments.batch, arguments.sequence)
        self.batches = torch.randint(0, arguments.vocabulary, shape, generator=torch.Generator().manual_seed(arguments.seed))
        self.steps_done = 0

    def step(self) -> float:
        """Forward, backward, clip to norm 1, update; returns the loss (language model plus auxiliary)."""
        tokens = self.batches[self.steps_done % len(self.batches)]
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.steps_done += 1
        return float(loss.detach())


def peak_memory_mb() -> float:
    """Peak resident memory of this process in MB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def say(line: str) -> None:
    """One line to the driver, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Set up, take the first step, then serve ``run N`` lines."""
    arguments = parse_arguments()
    trainer = Trainer(arguments)
    begin = time.perf_counter()
    trainer.step()
    ready = {
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "first_step_seconds": time.perf_counter() - begin,
        "peak_memory_mb": peak_memory_mb(),
    }
    say("ready " + json.dumps(ready))
    for line in sys.stdin:
        words = line.split()
        if not words:
            continue
        if words == ["quit"]:
            break
        if len(words) != 2 or words[0] != "run" or not words[1].isdigit() or int(words[1]) < 1:
            say(json.dumps({"error": f"expected 'run N' with N >= 1 or 'quit', got {line.strip()!r}"}))
            continue
        steps, loss = int(words[1]), float("nan")
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            loss = trainer.step()
        answer = {
            "steps": steps,
            "wall_seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "loss": loss,
            "peak_memory_mb": peak_memory_mb(),
        }
        say(json.dumps(answer))


if __name__ == "__main__":
    main()
