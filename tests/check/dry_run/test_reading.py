"""What a dry run reads from MindSpore's log and files, on files that are written here."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from pangu_locmoe.check.dry_run.reading import (
    Collective,
    RankRun,
    difference,
    failure,
    overlaps,
    read_rank,
)

COLUMNS = ("index", "node_name", "logic_id", "stream_id", "node_info", "event_id", "group")
COMMUNICATION = ("index", "group", "primitive", "input_type", "input_size", "output_size")
LOG = """\
[INFO] DEVICE(1,7f,python):2026-01-01 [a.cc:175] GenerateKernelMod] kernel opname:{}, kernel type:{}
"""


def row(name: str, stream: int = 0, event: str = "", group: str = "") -> dict[str, str]:
    return dict(zip(COLUMNS, ("1", name, "0", str(stream), "@graph0:CNode_1{}", event, group)))


# Two chunks: the second departs after the first, and the experts work while it is under way.
CHUNKS = [
    row("Default/MatMul-op0"),
    row("Default/AlltoAllV-op0", 2, group="world"),
    row("Default/StreamSend-op0", 2, "7"),
    row("Default/StreamRecv-op0", 0, "7"),
    row("Default/AlltoAllV-op1", 2, group="world"),
    row("Default/StreamSend-op1", 2, "8"),
    row("Default/Reshape-op0"),
    row("Default/BatchMatMul-op0"),
    row("Default/Mul-op0"),
    row("Default/BatchMatMul-op1"),
    row("Default/StreamRecv-op1", 0, "8"),
    row("Default/BatchMatMul-op2"),
    row("Gradients/Default/Grad_AlltoAllV/AlltoAllV-op2", 2, group="world"),
    row("Default/Mul-op1"),
    row("Default/reduce-Reduce/AllReduce-op0", 2, group="world"),
]


def test_what_is_computed_until_the_first_wait():
    found = [
        (each.operator, each.direction, each.products, each.kernels)
        for each in overlaps("graph0", CHUNKS)
    ]
    assert found == [
        ("AlltoAllV", "forward", 0, 0),
        ("AlltoAllV", "forward", 2, 3),
        ("AlltoAllV", "backward", 0, 1),  # nothing waits for it: until the graph's end
        ("AllReduce", "backward", 0, 0),
    ]


def test_an_event_that_was_sent_before_the_exchange_is_no_wait_for_it():
    rows = [
        row("StreamSend-op0", 2, "1"),
        row("AlltoAllV-op0", 2),
        row("StreamRecv-op0", 0, "1"),
        row("MatMul-op0"),
        row("StreamSend-op1", 2, "1"),
        row("StreamRecv-op1", 0, "1"),
        row("MatMul-op1"),
    ]
    assert overlaps("graph", rows)[0].products == 1


def test_a_gradient_that_is_not_called_one_is_backward():
    """As of the group-wise exchange, which is a Cell with its own gradient."""
    rows = [
        row("Default/AlltoAllV-op0", 2),
        row("Gradients/Default/Grad_MatMul/MatMul-op0"),
        row("Default/AlltoAllV-op1", 2),
    ]
    assert [each.direction for each in overlaps("graph", rows)] == ["forward", "backward"]


def write(folder: Path, rows=CHUNKS, log: str = LOG.format("MatMul", "opapi_kernel")) -> Path:
    """A rank's folder as MindSpore leaves it."""
    order = folder / "graphs" / "rank_3" / "execute_order"
    order.mkdir(parents=True)
    collectives = [
        dict(zip(COMMUNICATION, ("1", "world", "AlltoAllV", "Float16", "64", "64"))),
        dict(zip(COMMUNICATION, ("2", "world", "AllReduce", "Float32", "4", "4"))),
    ]
    for name, columns, lines in (
        ("execute_order.csv", COLUMNS, rows),
        ("comm_execute_order.csv", COMMUNICATION, collectives),
    ):
        with (order / name).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(lines)
    (folder / "log.txt").write_text(log, encoding="utf-8")
    result = {"weights": [], "groups": {"world": [0, 3]}, "peak_bytes": 12, "seconds": 2.5}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


def test_a_rank(tmp_path):
    lines = LOG.format("MatMul", "opapi_kernel") * 2 + LOG.format("Sort", "acl_kernel")
    run = read_rank(write(tmp_path, log=lines), 3, 0)
    assert run.failure is None and run.on_host == [] and run.host_python == []
    assert run.kernels == {"aclnn": {"MatMul": 2}, "aclop": {"Sort": 1}}
    assert run.launches == 10  # neither the view nor the events
    assert run.collectives == [
        Collective("world", "AlltoAllV", "Float16", ()),
        Collective("world", "AllReduce", "Float32", ("4", "4")),
    ]
    assert (run.peak_bytes, run.seconds, run.groups) == (12, 2.5, {"world": [0, 3]})


def test_kernels_of_the_cpu_and_python_are_found(tmp_path):
    line = "[WARNING] DEVICE: no kernel on Ascend, backoff CPU kernel, node: Default/LSTM-op0\n"
    write(tmp_path, log=LOG.format("MatMul", "opapi_kernel") + line)
    actors = tmp_path / "graphs" / "rank_3" / "actor_set"
    actors.mkdir()
    (actors / "final_actor_set_kernel_graph_0.ir").write_text("kernel: PyExecute-op2 PyExecute-op2")
    run = read_rank(tmp_path, 3, 0)
    assert run.on_host == ["Default/LSTM-op0"] and run.host_python == ["PyExecute-op2"]


@pytest.mark.parametrize("lost", ["log.txt", "execute_order.csv"])
def test_where_nothing_is_found_nothing_is_good(tmp_path, lost):
    write(tmp_path)
    (path,) = tmp_path.rglob(lost)
    path.write_text("another format\n", encoding="utf-8")
    assert "nothing was found" in (read_rank(tmp_path, 0, 0).failure or "")


def test_a_failure_is_one_line(tmp_path):
    log = "[ERROR] ANALYZER: long\nTraceback:\nRuntimeError: 'LSTM' has no kernel\n\n- C++ Call\n"
    run = read_rank(write(tmp_path, log=log), 0, 1)
    assert run.failure == "RuntimeError: 'LSTM' has no kernel (exit code 1)"
    assert failure("", -11) == "exit code -11"
    assert failure("Fatal Python error: Segmentation fault\n\nThread\n", -11) == (
        "Fatal Python error: Segmentation fault (exit code -11)"
    )


def ranked(rank: int, *collectives: tuple[str, str]) -> RankRun:
    return RankRun(
        rank, collectives=[Collective(group, name, "Float32", ()) for group, name in collectives]
    )


def test_ranks_agree_in_the_groups_that_they_share():
    one = ranked(0, ("world", "AllReduce"), ("own", "AllGather"), ("world", "AlltoAllV"))
    two = ranked(5, ("other", "AllGather"), ("world", "AllReduce"), ("world", "AlltoAllV"))
    assert difference(one, two) is None


def test_where_ranks_part():
    one = ranked(0, ("a", "AllReduce"), ("b", "AllReduce"))
    swapped = ranked(1, ("b", "AllReduce"), ("a", "AllReduce"))
    assert difference(one, swapped) == (
        "collective 1 of the groups that ranks 0 and 1 share is AllReduce Float32 in a on the "
        "first, AllReduce Float32 in b on the second"
    )
    fewer = ranked(2, ("a", "AllReduce"))
    more = ranked(3, ("a", "AllReduce"), ("a", "AllReduce"))
    assert "1 and 2 collectives" in (difference(fewer, more) or "")
