"""Write a router, train it, and train LocMoE's beside it: `python
scripts/examples/own_router.py`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from mindspore import Tensor, ops

from pangu_locmoe.config import load_config
from pangu_locmoe.moe.routers import GatedRouter
from pangu_locmoe.nn.noise import Noise
from pangu_locmoe.train.run import train

HERE = Path(__file__).resolve().parent


class FirstFeatures(GatedRouter):
    """The first E features of a token are the logits of the E experts: a gate without
    parameters.
    """

    def logits(self, x_TD: Tensor, noise: Noise, training: bool) -> Tensor:
        return x_TD[:, : self.num_experts]

    def cosine(self, x_TD: Tensor, logits_TE: Tensor, expert_T: Tensor) -> Tensor:
        # An expert's gate is a unit vector: the cosine is the expert's feature over the token's
        # length.
        chosen_T1 = ops.gather_elements(logits_TE, 1, ops.expand_dims(expert_T, 1))
        return ops.squeeze(chosen_T1, 1) / ops.sqrt(ops.reduce_sum(x_TD * x_TD, 1) + 1e-6)


def main() -> None:
    work = Path(tempfile.mkdtemp(prefix="own-router-"))
    text = [{"path": str(HERE.parents[1] / "docs" / "*.md"), "domain": "prose"}]
    # module:Class; this script's folder is on the Python path, as the working directory would be.
    for router in ("own_router:FirstFeatures", "locmoe"):
        values = {"moe.router": router, "data.sources": text, "data.prepared_dir": str(work)}
        run_dir = work / router.rpartition(":")[2]
        train(load_config(HERE / "tiny.yaml", values), run_dir, progress=False)
    for run_dir in (work / "FirstFeatures", work / "locmoe"):
        final = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["final"]
        loss = final["validation_loss"]
        bits = final["bits_per_byte"]
        print(f"{run_dir.name:14} validation loss {loss:.3f}, {bits:.3f} bits per byte")


if __name__ == "__main__":
    main()
