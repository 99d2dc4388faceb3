"""Routing traces of other frameworks: counted as NumPy counts them, and every bad line named."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_locmoe.cli import main
from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.importing import import_trace
from pangu_locmoe.expert_load.trace import read_trace, write_trace


def write(path, text: str):
    path.write_bytes(
        gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode()
    )
    return path


def lines(*rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def line(step=0, layer=0, rank=0, top_indices=(0, 1)):
    return {"step": step, "layer": layer, "rank": rank, "top_indices": top_indices}


def test_a_small_example_by_hand(tmp_path):
    text = lines(
        line(7, 5, 1, [[0, 2], [2, 1]]),
        line(3, 1, 0, [2, 2, 0]),
        line(3, 5, 2, []),
        "",
        line(7, 1, 0, [[1], [1]]),
        line(3, 1, 0, [0]),  # adds to the second line
    )
    trace = import_trace(write(tmp_path / "routing.jsonl", text))
    assert trace.step_W.tolist() == [3, 7] and trace.dropped_WLE is None
    assert trace.load_WLE.tolist() == [[[2, 0, 2], [0, 0, 0]], [[0, 2, 0], [1, 1, 2]]]
    assert trace.source_WLNE.tolist() == [
        [[[2, 0, 2], [0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0], [0, 0, 0]]],
        [[[0, 2, 0], [0, 0, 0], [0, 0, 0]], [[0, 0, 0], [1, 1, 2], [0, 0, 0]]],
    ]
    merged = import_trace(tmp_path / "routing.jsonl", num_experts=5, ranks_per_node=2)
    assert merged.source_WLNE.shape == (2, 2, 2, 5) and merged.source_WLNE[1, 1].tolist() == [
        [1, 1, 2, 0, 0],
        [0] * 5,
    ]


def test_no_rank_gives_no_source(tmp_path):
    trace = import_trace(
        write(tmp_path / "a.jsonl", lines({"step": 1, "layer": 0, "top_indices": [1], "x": [0.5]}))
    )
    assert trace.source_WLNE is None and trace.load_WLE.tolist() == [[[0, 1]]]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_it_counts_as_numpy_does(tmp_path_factory, data):
    """Random routing, written as JSONL and as CSV, plain and gzipped, lines shuffled: the same
    trace, which survives writing.
    """
    steps, layers = (
        sorted(data.draw(st.sets(st.integers(0, 9), min_size=1, max_size=4))) for _ in range(2)
    )
    ranks, experts, top_k, tokens = (data.draw(st.integers(1, most)) for most in (4, 6, 3, 5))
    per_node = data.draw(st.integers(1, 3))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    chosen = random.integers(0, experts, (len(steps), len(layers), ranks, tokens, top_k))
    expected = np.zeros((len(steps), len(layers), -(-ranks // per_node), experts), int)
    table = ["step,layer,expert,tokens,rank"]
    rows = []
    for place in np.ndindex(chosen.shape[:3]):
        step = steps[place[0]]
        layer = layers[place[1]]
        rank = place[2]
        count_E = np.bincount(chosen[place].ravel(), minlength=experts)
        expected[place[0], place[1], rank // per_node] += count_E
        table += [f"{step},{layer},{expert},{count},{rank}" for expert, count in enumerate(count_E)]
        half = data.draw(st.integers(0, tokens))
        for part in (chosen[place][:half], chosen[place][half:]):
            rows.append(line(step, layer, rank, (part[:, 0] if top_k == 1 else part).tolist()))
    rows = data.draw(st.permutations(rows))
    table[1:] = data.draw(st.permutations(table[1:]))
    folder = tmp_path_factory.mktemp("import")
    for name, text in (
        ("a.jsonl", lines(*rows)),
        ("a.jsonl.gz", lines(*rows)),
        ("a.csv", lines(*table)),
        ("a.csv.gz", lines(*table)),
    ):
        trace = import_trace(write(folder / name, text), experts, per_node)
        assert trace.step_W.tolist() == steps
        np.testing.assert_array_equal(trace.source_WLNE, expected)
        np.testing.assert_array_equal(trace.load_WLE, expected.sum(2))
    write_trace(folder / "load.npz", trace)
    np.testing.assert_array_equal(read_trace(folder / "load.npz").source_WLNE, expected)


def test_csv_columns_may_come_in_any_order_and_missing_experts_are_0(tmp_path):
    text = '\ufeff"tokens","expert","node","step","layer"\r\n5,3,1,10,2\r\n\r\n7,0,0,20,2\r\n1,3,1,20,2\r\n'
    trace = import_trace(
        write(tmp_path / "a.csv", text), ranks_per_node=2
    )  # nodes are nodes already
    assert trace.step_W.tolist() == [10, 20]
    assert trace.source_WLNE.tolist() == [
        [[[0, 0, 0, 0], [0, 0, 0, 5]]],
        [[[7, 0, 0, 0], [0, 0, 0, 1]]],
    ]
    assert (
        import_trace(write(tmp_path / "b.csv", "step,layer,expert,tokens\n1,0,1,4\n")).source_WLNE
        is None
    )


@pytest.mark.parametrize(
    "bad, words",
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("7", "not a JSON object"),
        ({"layer": 0, "rank": 0, "top_indices": [0]}, "step must be an integer, is null"),
        (line(step=True), "step must be an integer, is true"),
        (line(step=1.0), "step must be an integer, is 1.0"),
        (line(layer="2"), "layer must be an integer"),
        (line(rank=None), "rank must be an integer, is null"),
        ({"step": 1, "layer": 0, "top_indices": [0]}, "has no rank, earlier lines have one"),
        (line(step=-1), "step -1: must be 0 to"),
        (line(layer=-1), "layer -1: must be 0 to"),
        (line(layer=10**6), "layer 1000000: must be 0 to 65535"),
        (line(rank=-1), "rank or node -1: must be 0 to"),
        (line(top_indices=[0, -1]), "expert -1: must be 0 to 65535"),
        (line(top_indices=[[0], [10**30]]), f"expert {10**30}: must be 0 to 65535"),
        (line(top_indices=[0, True]), "top_indices must be"),
        (line(top_indices=[[0, 1], [2.0, 1]]), "top_indices must be"),
        (line(top_indices=[[0, 1], 2]), "top_indices must be"),
        (line(top_indices=[0, [1]]), "top_indices must be"),
        (line(top_indices=[[[0]]]), "top_indices must be"),
        (line(top_indices=None), "top_indices must be"),
        (line(top_indices=["0"]), "top_indices must be"),
        ('{"step": 1, "layer": 0, "rank": 0, "top_indices": [NaN]}', "top_indices must be"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, bad, words):
    file = write(tmp_path / "a.jsonl", lines(line(), "", bad, line(1)))
    with pytest.raises(DataError, match=rf"^{file}, line 3: .*{words}") as caught:
        import_trace(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "bad, words",
    [
        ("1,0,0", "has 3 cells, the header has 4"),
        ("1,0,0,2,5", "has 5 cells"),
        ("1,0,0,-2", "tokens must be a whole number"),
        ("1,0,0,2.0", "tokens must be a whole number"),
        ("1,0,0,nan", "tokens must be a whole number"),
        ("1,0,0,1_0", "tokens must be a whole number"),
        ("1,0,٣,1", "expert must be a whole number"),
        ("1,0,True,1", "expert must be a whole number"),
        ("1,0,70000,1", "expert 70000: must be 0 to 65535"),
        ("1,0,0," + "9" * 5000, "tokens must be a whole number"),
        ("1,0,0,999999999999999999", "more than"),
        (",0,0,1", "step must be a whole number"),
        ("1,0,0,\0002", "tokens must be|not CSV"),
        (
            "1,0,0," + "9" * 200_000,
            "not CSV: field larger|tokens must be",
        ),  # the limit is the whole process's
        ("1,0,0,2\r1,0,1,2", "has a carriage return within it"),
        ('1,0,0,"2"x', "not CSV"),
    ],
)
def test_bad_csv_lines_are_named(tmp_path, bad, words):
    file = write(tmp_path / "a.csv", lines("step,layer,expert,tokens", "0,0,0,2", bad, "2,0,0,2"))
    with pytest.raises(DataError, match=rf"^{file}, line 3: .*{words}"):
        import_trace(file)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "step,layer,expert",
        "step,layer,expert,tokens,rank,node",
        "step,layer,expert,tokens,tokens",
        "0,0,0,1",
    ],
)
def test_other_headers_are_refused(tmp_path, header):
    with pytest.raises(DataError, match=r"line 1: the header must be step,layer,expert,tokens"):
        import_trace(write(tmp_path / "a.csv", header + "\n0,0,0,1\n"))


@pytest.mark.parametrize("name", ["a.CSV", "a.Csv", "a.csv.gz", "a.CSV.GZ"])
def test_the_name_of_a_table_may_have_capitals(tmp_path, name):
    content = b"step,layer,expert,tokens\r\n0,0,1,5\r\n"
    (tmp_path / name).write_bytes(
        gzip.compress(content, mtime=0) if name.lower().endswith(".gz") else content
    )
    assert import_trace(tmp_path / name).load_WLE.tolist() == [[[0, 5]]]


@pytest.mark.parametrize(
    "name, content",
    {
        "a.csv": b"step,layer,expert,tokens\r0,0,0,5\r",  # an old Macintosh's line ends
        "b.csv": "step,layer,expert,tokens\n0,0,0,5\n".encode("utf-16"),
        "c.csv": "step,layer,expert,tokens\n0,0,0,5\n".encode("utf-16-le"),
        "d.csv": b'"step\nlayer"\n0,0\n',
        "e.csv": b'step,layer,expert,tokens\n0,0,0,"5\n',
        "f.csv": b"step,layer,expert,tokens\n"
        + b"0,0,0,999999999999999999\n" * 40,  # whose sum is out of int64
        "g.csv.gz": gzip.compress(b"step,layer,expert,tokens\n" + b"0,0,0,5\n" * 5000, mtime=0)[
            :60
        ],
        "h.csv.gz": gzip.compress(b"step,layer,expert,tokens\n0,0,0,5\n", mtime=0) + b"more",
        "i.tsv": b"step\tlayer\texpert\ttokens\n",
        "j.jsonl": b'{"step":0,"layer":0,"top_indices":[0]}\r{"step":1,"layer":0,"top_indices":[0]}\r',
        "k.jsonl": b'{"step":0,\0"layer":0,"top_indices":[0]}\n',
        "l.jsonl": '{"step":0,"layer":0,"top_indices":[0]}\n'.encode("utf-16"),
    }.items(),
)
def test_any_other_content_is_one_line(tmp_path, name, content, capsys):
    (tmp_path / name).write_bytes(content)
    assert main(["load", "import", str(tmp_path / name), "--output", str(tmp_path / "o.npz")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"pangu-locmoe: {tmp_path / name}, line ") and said.count("\n") == 1
    assert not (tmp_path / "o.npz").exists()


def test_a_line_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pangu_locmoe.expert_load.importing.lines.LARGEST_LINE", 2**20)
    with pytest.raises(DataError, match="line 2: is longer than 1 MiB"):
        import_trace(write(tmp_path / "a.jsonl.gz", lines(line()) + "x" * 2**22))


def test_a_missing_layer_is_named(tmp_path):
    rows = [line(step, layer) for step in (10, 20) for layer in (1, 3, 5)]
    with pytest.raises(DataError, match=r"a\.jsonl: step 20 has no layer 3"):
        import_trace(write(tmp_path / "a.jsonl", lines(*rows[:4], *rows[5:])))
    with pytest.raises(DataError, match=r"a\.csv: step 1 has no layer 4"):
        import_trace(
            write(tmp_path / "a.csv", "step,layer,expert,tokens\n0,4,0,1\n1,2,0,1\n0,2,0,1\n")
        )


def test_what_does_not_fit_the_arguments(tmp_path):
    file = write(tmp_path / "a.jsonl", lines(line(), line(1, top_indices=[4])))
    with pytest.raises(DataError, match=r"line 2: expert 4: must be 0 to 3"):
        import_trace(file, num_experts=4)
    for arguments in ({"num_experts": 0}, {"ranks_per_node": 0}):
        with pytest.raises(DataError, match="must be 1 to"):
            import_trace(file, **arguments)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"absent: cannot be read: No such file"):
        import_trace(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no rows"):
        import_trace(write(tmp_path / "empty.jsonl", "\n"))
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(line()).encode() + b'{"step": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 2: not UTF-8"):
        import_trace(file)
    whole = gzip.compress("".join(lines(line(step)) for step in range(1000)).encode())
    for content in (whole[: len(whole) // 2], whole[:30] + bytes([whole[30] ^ 255]) + whole[31:]):
        (tmp_path / "b.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"line \d+: "):
            import_trace(tmp_path / "b.jsonl.gz")


def test_too_large_a_table_is_refused_before_it_is_made(tmp_path, monkeypatch):
    tracemalloc.start()
    with pytest.raises(
        DataError,
        match="line 2: 1 rows of 65536 nodes and 65536 experts are more than 16777216 counts",
    ):
        import_trace(
            write(
                tmp_path / "a.jsonl",
                lines(line(rank=65_535, top_indices=[0]), line(1, top_indices=[65_535])),
            )
        )
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    monkeypatch.setattr("pangu_locmoe.expert_load.importing.counts.LARGEST_TRACE", 100)
    with pytest.raises(
        DataError, match="line 12: 11 rows of 1 nodes and 10 experts are more than 100 counts"
    ):
        import_trace(
            write(tmp_path / "b.jsonl", lines(*(line(step, top_indices=[9]) for step in range(20))))
        )


def test_memory_follows_the_trace_and_not_the_file(tmp_path):
    rows = lines(line(0, 0, 0, [[1, 2]] * 500)) * 100  # 100,000 choices, one row of the trace
    table = "step,layer,expert,tokens\n" + "3,2,1,1\n" * 20_000
    for name, text, expected in (
        ("a.jsonl.gz", rows, [0, 50_000, 50_000]),
        ("a.csv", table, [0, 20_000]),
    ):
        file = write(tmp_path / name, text)
        tracemalloc.start()
        trace = import_trace(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert trace.load_WLE.tolist() == [[expected]]
        assert peak < 2e6  # as lists of integers or of rows the whole file would be 4 MB
