"""What the scripts ask before they start processes: how many, on how many nodes, and whether
that can work.
"""

from __future__ import annotations

import json

import pytest

from pangu_locmoe.errors import LocMoEError
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.job import Job, main, plan_job

MODEL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_layers": 3,
    "num_moe_layers": 1,
    "num_heads": 4,
    "ffn_size": 32,
    "seq_length": 16,
}
SOURCES = [{"path": "text", "domain": str(domain)} for domain in range(4)]


@pytest.fixture
def config(tmp_path):
    """Writes a configuration of four domains and eight experts."""

    def write(**sections):
        values = {
            "model": MODEL,
            "moe": {"num_experts": 8, "levels": 1},
            "data": {"sources": SOURCES},
            "train": {"batch_size": 16},
            **sections,
        }
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(values), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    "parallel, overrides, numbers, wanted",
    [
        ({}, [], {}, Job(4, 1, 4)),
        ({"nodes": 4}, [], {}, Job(4, 4, 4)),  # a configuration for one process that emulates them
        ({"nodes": 2}, [], {}, Job(4, 2, 4)),
        ({"nodes": 8}, [], {}, Job(8, 8, 8)),  # as few as have a rank in each node
        ({"nodes": 4}, [], {"ranks": 8}, Job(8, 4, 8)),
        ({"nodes": 4}, [], {"ranks": 4, "ranks_per_node": 2}, Job(4, 2, 4)),
        ({"nodes": 4}, [], {"nodes": 2}, Job(4, 2, 4)),
        ({"nodes": 4}, [], {"nodes": 2, "ranks_per_node": 4}, Job(8, 2, 8)),
        ({"nodes": 4}, [], {"ranks_per_node": 2}, Job(8, 4, 8)),
        ({"nodes": 4}, ["parallel.nodes=2"], {}, Job(4, 2, 4)),
        ({"nodes": 4}, ["parallel.nodes=2"], {"ranks": 2, "nodes": 2}, Job(2, 2, 2)),
        ({"nodes": 2, "expert_parallel": 2}, [], {}, Job(4, 2, 2)),  # the file's, if it says one
        ({"nodes": 2}, ["parallel.expert_parallel=1"], {}, Job(4, 2, 1)),
        ({"nodes": 2}, ["parallel.tensor_parallel=2"], {}, Job(4, 2, 2)),
        ({"nodes": 4, "tensor_parallel": 2}, [], {}, Job(8, 4, 4)),
        ({"nodes": 4}, [], {"ranks": 1}, Job(1, 4, 1)),
    ],
)
def test_a_job_is_what_flags_and_configuration_say(config, parallel, overrides, numbers, wanted):
    completed, job = plan_job(config(parallel=parallel), overrides, **numbers)
    assert job == wanted and (completed.parallel.nodes, completed.parallel.expert_parallel) == (
        job.nodes,
        job.expert_parallel,
    )
    assert Topology.from_config(completed, job.ranks).num_nodes == job.nodes


def test_what_needs_an_exchange_is_read_with_one(config):
    """A file that is wrong for one process, whose experts a job shares."""
    static = {
        "moe": {
            "num_experts": 8,
            "levels": 1,
            "capacity": {"local_factor": 2.0, "remote_factor": 1.0},
        },
        "parallel": {"nodes": 2, "sizes": "static"},
    }
    assert plan_job(config(**static), [])[1] == Job(4, 2, 4)


@pytest.mark.parametrize(
    "sections, overrides, numbers, message",
    [
        (
            {"parallel": {"nodes": 4}},
            [],
            {"ranks": 6},
            r"moe\.num_experts \(8\) must be divisible by the 6 ranks that would share the experts; give --ranks",
        ),
        (
            {"parallel": {"nodes": 4}},
            [],
            {"ranks": 2},
            r"ranks \(2\) must be divisible by parallel\.nodes \(4\): .*; start 4, or set parallel\.nodes to 2",
        ),
        (
            {},
            [],
            {"ranks": 4, "ranks_per_node": 3},
            "--ranks 4: must be divisible by --ranks-per-node 3",
        ),
        (
            {},
            [],
            {"ranks": 4, "ranks_per_node": 2, "nodes": 4},
            "--nodes 4: --ranks 4 with --ranks-per-node 2 are 2 nodes",
        ),
        (
            {},
            ["parallel.nodes=4"],
            {"nodes": 2},
            r"parallel\.nodes = 4: the script's flags make 2 nodes",
        ),
        (
            {"train": {"batch_size": 6}},
            [],
            {},
            r"train\.batch_size \(6\) must be divisible by ranks \(4\)",
        ),
        (
            {"parallel": {"nodes": 4, "tensor_parallel": 2}},
            [],
            {"ranks": 4},
            r"ranks of a node \(4 / parallel\.nodes 4 = 1\) must be divisible by parallel\.tensor",
        ),
        (
            {"parallel": {"nodes": 2, "expert_parallel": 8}},
            [],
            {},
            r"ranks \(4\) must be divisible by parallel\.expert_parallel \(8\)",
        ),
        ({"parallel": {"emulated_nodes": 4}}, [], {}, r"write parallel\.nodes: 4"),
        ({"parallel": {"nodes": "four"}}, [], {}, r"parallel\.nodes = 'four': must be an integer"),
        (
            {"data": {"sources": SOURCES, "sharding": "domain"}},
            [],
            {},
            r"data\.sharding = 'domain': needs more than one node",
        ),
    ],
)
def test_what_cannot_work_is_one_line(config, sections, overrides, numbers, message):
    with pytest.raises(LocMoEError, match=message) as caught:
        plan_job(config(**sections), overrides, **numbers)
    assert "\n" not in str(caught.value)


def test_the_program_prints_three_numbers_or_why_not(config, capsys):
    path = str(config(parallel={"nodes": 4}))
    assert main([path]) == 0
    assert capsys.readouterr().out == "4 4 4\n"
    for flags, said in (
        (["--ranks", "3"], "moe.num_experts (8)"),
        (["--set", "train.precision=bf16"], "train.precision = 'bf16'"),
    ):
        assert main([path, *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith(said) and error.count("\n") == 1
