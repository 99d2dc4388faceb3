"""The Hugging Face side of the speed comparison: MixtralForCausalLM training steps on the CPU,
driven line by line.

The process prints one line ``ready {json}`` after its first step. Then it reads lines from standard
input: ``run N`` trains N steps and answers with one JSON line; ``quit`` or the end of the input
ends it. A driver can so interleave it with another trainer on the same machine, which is the only
fair way to compare on shared cores. Needs torch and transformers, not MindSpore.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from typing import Any, Callable, Iterable, NoReturn, Optional, Sequence


class Parser(argparse.ArgumentParser):
    """Named flags in full; a bad one ends the program with one line and exit code 2."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the flags\n")


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def add_shape_flags(parser: argparse.ArgumentParser) -> None:
    """The sizes that both sides share."""
    parser.add_argument("--hidden", type=count, default=256, help="hidden size")
    parser.add_argument("--heads", type=count, default=4, help="attention heads")
    parser.add_argument("--vocabulary", type=count, default=4096, help="vocabulary size")
    parser.add_argument("--sequence", type=count, default=256, help="tokens in a sequence")
    parser.add_argument("--batch", type=count, default=4, help="sequences in a batch")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="constant learning rate")
    parser.add_argument("--seed", type=count, default=1, help="seed of weights and tokens")


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the flags; the defaults are the comparison of docs/performance.md: 4 layers of 8
    experts, top-1, 4 x 256 tokens.
    """
    parser = Parser(str(__doc__).splitlines()[0])
    add_shape_flags(parser)
    parser.add_argument("--threads", type=count, default=2, help="torch threads")
    parser.add_argument(
        "--layers", type=count, default=4, help="decoder layers, every one with experts"
    )
    parser.add_argument(
        "--intermediate",
        type=count,
        default=688,
        help="SwiGLU width; 688 has nearly the parameters of a two-matrix MLP of 1,024",
    )
    parser.add_argument(
        "--experts",
        type=int,
        default=8,
        help="experts in each layer, top-1; 0 builds the dense twin, a Mistral",
    )
    parser.add_argument(
        "--implementation",
        default="grouped_mm",
        choices=["grouped_mm", "batched_mm", "eager"],
        help="how the experts run",
    )
    return parser.parse_args(argv)


def build_model(arguments: argparse.Namespace) -> Any:
    """Build the causal language model in float32 from the flags; with ``--experts 0`` its dense
    twin.
    """
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
        import transformers

        torch.set_num_threads(arguments.threads)
        torch.manual_seed(arguments.seed)
        self.torch = torch
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        self.model = build_model(arguments).to(torch.float32).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=arguments.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            fused=True,
        )
        shape = (8, arguments.batch, arguments.sequence)
        self.batches = torch.randint(
            0, arguments.vocabulary, shape, generator=torch.Generator().manual_seed(arguments.seed)
        )
        self.steps_done = 0

    @property
    def parameters(self) -> int:
        """Trainable parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def step(self) -> float:
        """Forward, backward, clip to norm 1, update; returns the loss (language model plus
        auxiliary).
        """
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


def serve(trainer: Any, lines: Iterable[str], answer: Callable[[str], None] = say) -> None:
    """Take the first step, say so, then obey ``run N`` lines until ``quit`` or the end.

    Args:
        trainer: has ``step() -> loss``, ``parameters`` and ``versions``.
        lines: what the driver says.
        answer: takes the lines that go back.
    """
    begin = time.perf_counter()
    trainer.step()
    ready = {
        "parameters": trainer.parameters,
        "versions": trainer.versions,
        "first_step_seconds": time.perf_counter() - begin,
        "peak_memory_mb": peak_memory_mb(),
    }
    answer("ready " + json.dumps(ready))
    for line in lines:
        words = line.split()
        if not words:
            continue
        if words == ["quit"]:
            break
        if len(words) != 2 or words[0] != "run" or not words[1].isdigit() or int(words[1]) < 1:
            answer(
                json.dumps(
                    {"error": f"expected 'run N' with N >= 1 or 'quit', got {line.strip()!r}"}
                )
            )
            continue
        steps = int(words[1])
        loss = float("nan")
        wall = time.perf_counter()
        cpu = time.process_time()
        for _ in range(steps):
            loss = trainer.step()
        result = {
            "steps": steps,
            "wall_seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "loss": loss,
            "peak_memory_mb": peak_memory_mb(),
        }
        answer(json.dumps(result))


def main() -> None:
    """Set up and serve."""
    serve(Trainer(parse_arguments()), sys.stdin)


if __name__ == "__main__":
    main()
