"""Reads the byte counters of an emulated cluster's links while a job trains, and holds them against
the job's ledger.

Started by emulate_cluster.sh; ends at SIGTERM and then writes RUN_DIR/links.json. Counters are read
when the job begins, at each new row of metrics.jsonl, and at the end, so that the traffic of the
training steps is known apart from that of joining, of evaluations and of checkpoints.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

ECHO = 2  # MCCL answers every message with its own payload
# bytes of Ethernet, IPv4 and TCP with time stamps in each packet, all there is in a bare
# acknowledgement
HEADERS = 66


class Links:
    """Bytes each node has sent and received, as its end of the bridge counted them."""

    def __init__(self, owner: int, nodes: int) -> None:
        self.folders = [
            Path(f"/sys/class/net/moe{owner}v{node}/statistics") for node in range(nodes)
        ]

    def read(self) -> Dict[str, List[int]]:
        """What a node sent is what its port of the bridge received."""
        return {
            name: [int((folder / name).read_text()) for folder in self.folders]
            for name in ("rx_bytes", "rx_packets", "tx_bytes")
        }


def watch(links: Links, metrics: Path) -> Dict[str, Any]:
    """Follow the job until SIGTERM; what the links carried, and that at the end of each training
    step.
    """
    stop: List[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the script, which sends SIGTERM when the job is over
    begin = end = links.read()
    seen: Optional[int] = metrics.stat().st_size if metrics.exists() else 0
    steps: List[Dict[str, Any]] = []
    while not stop:
        time.sleep(0.01)
        size = metrics.stat().st_size if metrics.exists() else 0
        if size < (seen or 0):
            seen = 0  # a resumed run takes out rows after its checkpoint
        if size == seen:
            continue
        end = links.read()
        with metrics.open("rb") as file:
            file.seek(seen or 0)
            lines = file.read().split(b"\n")
        seen = size - len(lines[-1])
        for line in lines[:-1]:
            row = json.loads(line)
            kind = "step" if "step_seconds" in row else "event"
            steps.append(
                {
                    kind: row["step"],
                    "bytes": sum(end["rx_bytes"]),
                    "packets": sum(end["rx_packets"]),
                    "ledger": row.get("inter_node_bytes"),
                    "reduced": row.get("reduce_inter_node_bytes"),
                }
            )
    end = links.read()
    sent = [after - before for before, after in zip(begin["rx_bytes"], end["rx_bytes"])]
    received = [after - before for before, after in zip(begin["tx_bytes"], end["tx_bytes"])]
    return {
        "links": [{"sent_bytes": out, "received_bytes": back} for out, back in zip(sent, received)],
        "steps": per_step(steps),
    }


def per_step(rows: List[Dict[str, Any]]) -> List[Dict[str, int]]:
    """Bytes on all links in each training step that directly followed another one: no evaluation
    came between.
    """
    steps = []
    for before, row in zip(rows, rows[1:]):
        if "step" in before and "step" in row and row["ledger"] is not None:
            wire = row["bytes"] - before["bytes"]
            steps.append(
                {
                    "step": row["step"],
                    "wire_bytes": wire,
                    "tcp_payload_bytes": wire - HEADERS * (row["packets"] - before["packets"]),
                    "ledger_bytes": row["ledger"],
                    "reduced_bytes": row["reduced"],
                }
            )
    return steps


def account(steps: List[Dict[str, int]]) -> Dict[str, Any]:
    """Totals over the steps, and how far the ledger of the exchange is from the counters once the
    reduction of the gradients is taken off.
    """
    wire, carried, ledger, reduced = (
        sum(step[key] for step in steps)
        for key in ("wire_bytes", "tcp_payload_bytes", "ledger_bytes", "reduced_bytes")
    )
    gradients = ECHO * reduced
    exchange = carried - gradients
    return {
        "steps": len(steps),
        "wire_bytes": wire,
        "tcp_payload_bytes": carried,
        "gradient_payload_bytes": gradients,
        "exchange_payload_bytes": exchange,
        "ledger_bytes": ledger,
        "ledger_error": (ECHO * ledger - exchange) / exchange if ledger else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--owner", type=int, required=True, help="the process that made the links")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--rate", required=True)
    options = parser.parse_args()
    run_dir: Path = options.run_dir
    watched = watch(Links(options.owner, options.nodes), run_dir / "metrics.jsonl")
    result = {
        "nodes": options.nodes,
        "ranks_per_node": options.ranks_per_node,
        "rate": options.rate,
        "echo": ECHO,
        "headers": HEADERS,
        "account": account(watched["steps"]),
        **watched,
    }
    (run_dir / "links.json").write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
