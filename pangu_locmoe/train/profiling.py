"""One step under MindSpore's profiler (`trace.profile`): every operator, on a CPU and on Ascend."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import mindspore as ms
from mindspore.profiler import ProfilerActivity, profile, tensorboard_trace_handler

FOLDER = "profile"
"""In the run directory; each rank has a folder of its own in it, with trace_view.json."""


@contextmanager
def profiled(run_dir: Path, wanted: bool) -> Iterator[None]:
    """What runs inside is profiled if `wanted`, and written to run_dir/profile."""
    if not wanted:
        yield
        return
    activities = [ProfilerActivity.CPU]
    if ms.get_current_device().device_target == "Ascend":
        activities.append(ProfilerActivity.NPU)
    handler = tensorboard_trace_handler(str(run_dir / FOLDER))
    with profile(activities=activities, on_trace_ready=handler):
        yield
