"""The ways from tokens to experts and back; one for each of where the experts are and how rows
travel.
"""

from __future__ import annotations

from typing import Optional

from pangu_locmoe.config import Config
from pangu_locmoe.moe.transport.base import Packed, Transport
from pangu_locmoe.moe.transport.counts import CountsTransport
from pangu_locmoe.moe.transport.local import LocalTransport
from pangu_locmoe.moe.transport.slots import SlotsTransport
from pangu_locmoe.parallel.exchange import Exchange
from pangu_locmoe.parallel.topology import Topology

__all__ = [
    "CountsTransport",
    "LocalTransport",
    "Packed",
    "SlotsTransport",
    "Transport",
    "make_transport",
]


def make_transport(
    config: Config, topology: Topology, exchange: Optional[Exchange] = None
) -> Transport:
    """The transport of a run: within this process without an exchange, else what parallel.sizes
    says.
    """
    if exchange is None:
        return LocalTransport(config, topology)
    if config.parallel.sizes == "static":
        return SlotsTransport(config, topology, exchange)
    return CountsTransport(config, topology, exchange)
