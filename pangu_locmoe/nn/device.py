"""Which device models are built for."""

from __future__ import annotations

import mindspore as ms


def on_ascend() -> bool:
    """Whether it is an Ascend device."""
    return bool(ms.get_context("device_target") == "Ascend")
