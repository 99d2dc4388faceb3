"""What torch.save writes, read without PyTorch: values as they were, and nothing that a file asks
for beside tensors and plain containers.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.torch_writer import Call, Name, Storage, pickled, save, save_pickle, tensor

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load import torch_file
from pangu_locmoe.expert_load.torch_file import read_torch

DUMPS = Path(__file__).resolve().parents[1] / "data" / "dumps"  # PyTorch 2.13.0 wrote these


def test_a_file_of_pytorch_itself():
    content = read_torch(DUMPS / "sglang_stat.pt")
    assert content["rank"] == 0 and content["average_utilization_rate_over_window"] == 0.5
    assert content["logical_count"].dtype == np.int32
    np.testing.assert_array_equal(content["logical_count"], np.arange(24).reshape(2, 3, 4))
    with pytest.raises(DataError, match=r"format of before PyTorch 1\.6"):
        read_torch(DUMPS / "sglang_stat_legacy.pt")


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize(
    "dtype", ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?", "c8", "c16"]
)
def test_tensors_of_every_type_and_byte_order(tmp_path, dtype, order):
    array = np.array([[0, 1, 2], [3, 250, 7]]).astype(dtype)
    stored = array if order == "little" else array.byteswap()
    found = read_torch(save(stored, tmp_path / "a.pt", order))
    assert found.dtype == np.dtype(dtype) and not found.flags.writeable
    np.testing.assert_array_equal(found, array)


def test_bfloat16_and_types_without_a_storage_class_of_their_own(tmp_path):
    half = np.array([1.5, -256, 3e38], np.float32)
    upper = (half.view(np.uint32) >> 16).astype(np.uint16)
    storage = Storage(upper.tobytes(), Name("torch", "BFloat16Storage"))
    found = read_torch(save(tensor(upper, storage), tmp_path / "a.pt"))
    np.testing.assert_allclose(found, half, rtol=2**-7)
    assert found[:2].tolist() == [1.5, -256]

    untyped = Storage(upper.tobytes(), Name("torch.storage", "UntypedStorage"), "cuda:0")
    for dtype, expected in (("uint16", upper.tolist()), ("bfloat16", found.tolist())):
        arguments = (untyped, 0, (3,), (1,), False, {}, Name("torch", dtype), None)
        call = Call(Name("torch._utils", "_rebuild_tensor_v3"), arguments)
        assert read_torch(save(call, tmp_path / "b.pt")).tolist() == expected


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_views_are_those_of_numpy(tmp_path_factory, data):
    """Offsets, transposed and repeated axes, empty and scalar tensors."""
    shape = data.draw(st.lists(st.integers(1, 4), max_size=3))
    array = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
    storage = Storage(array.tobytes(), Name("torch", "IntStorage"))
    view = array.transpose(data.draw(st.permutations(range(len(shape)))))
    for axis, length in enumerate(view.shape):
        first = data.draw(st.integers(0, length))
        last = data.draw(st.integers(first, length))
        step = data.draw(st.integers(1, 2))
        view = view[(slice(None),) * axis + (slice(first, last, step),)]
    if data.draw(st.booleans()):
        view = np.broadcast_to(view, (3, *view.shape))
    offset = (view.__array_interface__["data"][0] - array.__array_interface__["data"][0]) // 4
    call = tensor(view, storage, offset, tuple(step // 4 for step in view.strides))
    found = read_torch(save(call, tmp_path_factory.mktemp("view") / "a.pt"))
    assert found.shape == view.shape
    np.testing.assert_array_equal(found, view)


def test_containers_and_tensors_that_share_a_storage(tmp_path):
    storage = Storage(np.arange(6, dtype="i8").tobytes(), Name("torch", "LongStorage"))
    value = {
        "none": None,
        "flags": [True, False],
        "numbers": (1, -5, 2**40, 2**80, 1.5, "专家"),
        "bytes": Call(Name("_codecs", "encode"), ("\xff\x00", "latin1")),
        "set": Call(Name("__builtin__", "set"), ([1, 2],)),
        "ordered": Call(Name("collections", "OrderedDict"), ([["a", 1]],)),
        "size": Call(Name("torch", "Size"), ((2, 3),)),
        "device": Call(Name("torch", "device"), ("cuda", 1)),
        "first": tensor(np.zeros(2), storage, 1, (2,)),
        "parameter": Call(
            Name("torch._utils", "_rebuild_parameter"),
            (tensor(np.zeros(3), storage, 3, (1,)), True, {}),
        ),
        4: {},
    }
    for protocol in (2, 3, 4, 5):
        found = read_torch(save(value, tmp_path / "a.pt", protocol=protocol))
        assert found.pop("first").tolist() == [1, 3]
        assert found.pop("parameter").tolist() == [3, 4, 5]
        assert found == {
            "none": None,
            "flags": [True, False],
            "numbers": (1, -5, 2**40, 2**80, 1.5, "专家"),
            "bytes": b"\xff\x00",
            "set": {1, 2},
            "ordered": OrderedDict(a=1),
            "size": (2, 3),
            "device": "cuda:1",
            4: {},
        }


class _Attack:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_an_attack_is_refused_and_does_not_run(tmp_path, protocol):
    mark = tmp_path / "attacked"
    attacks = (
        _Attack(os.system, f"touch {mark}"),
        _Attack(eval, f"open({str(mark)!r}, 'w')"),
        _Attack(exec, f"open({str(mark)!r}, 'w')"),
    )
    for attack in attacks:
        program = pickle.dumps({"logical_count": 1, "x": attack}, protocol)
        file = save_pickle(program, [], tmp_path / "a.pt")
        with pytest.raises(
            DataError, match=r"which is neither a tensor|pickle instruction"
        ) as said:
            read_torch(file)
        assert "\n" not in str(said.value) and not mark.exists()
        pickle.loads(program)  # the attack is one
        assert mark.exists()
        mark.unlink()


@pytest.mark.parametrize(
    "program, words",
    [
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (b"cposix\nsystem\n(Vtrue\ntR.", "posix.system"),
        (b"cbuiltins\ngetattr\n.", "builtins.getattr"),
        (b"ctorch._utils\n_rebuild_sparse_tensor\n.", "_rebuild_sparse_tensor"),
        (b"ctorch\nload\n.", "torch.load"),
        (b"cnumpy.core.multiarray\n_reconstruct\n.", "_reconstruct"),
        (b"ctorch\nFloat8_e4m3fnStorage\n.", "Float8"),
        (b"(S'true'\nios\nsystem\n.", "pickle instruction b'S'"),
        (b"(ios\nsystem\n.", "pickle instruction b'i'"),
        (b"ccollections\nOrderedDict\n)\x81.", "pickle instruction"),
        (b"ccollections\nOrderedDict\n)R}b.", "pickle instruction b'b'"),
        (b"\x82\x01.", "pickle instruction"),
        (b"\x80\x02L" + b"9" * 10**6 + b"L\n.", "pickle instruction b'L'"),
        (b"\x80\x09N.", "damaged"),
        (b"", "damaged"),
        (b".", "damaged"),
        (b"N", "damaged"),
        (b"]" + b"r\xff\xff\xff\x7f" + b".", None),  # a memo of 2^31 entries in C
    ],
)
def test_other_programs_are_one_line(tmp_path, program, words):
    file = save_pickle(program, [], tmp_path / "a.pt")
    if words is None:
        assert read_torch(file) == []
        return
    with pytest.raises(DataError) as said:
        read_torch(file)
    assert words in str(said.value) and "\n" not in str(said.value)
    assert len(str(said.value)) < 300


INT = Name("torch", "IntStorage")


@pytest.mark.parametrize(
    "size, stride, offset",
    [
        ((7,), (1,), 0),
        ((6,), (1,), 1),
        ((2, 3), (4, 1), 0),
        ((1,), (1,), 6),
        ((1,), (1,), -1),
        ((2,), (-1,), 3),
        ((-2,), (1,), 0),
        ((2,), (1, 1), 0),
        ((2,), (True,), 0),
        ((2.0,), (1,), 0),
        ((2**25,), (0,), 0),
        ((2**40, 2**40), (0, 0), 0),
        ((2,), (2**70,), 0),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, size, stride, offset):
    storage = Storage(np.arange(6, dtype="i4").tobytes(), INT)
    call = Call(
        Name("torch._utils", "_rebuild_tensor_v2"), (storage, offset, size, stride, False, {})
    )
    with pytest.raises(DataError, match="a tensor of size"):
        read_torch(save(call, tmp_path / "a.pt"))


def test_storages_that_are_none(tmp_path):
    storage = Storage(b"12345", INT)
    for arguments in ((storage, 0, (1,), (1,)), (3, 0, (1,), (1,)), ()):
        call = Call(Name("torch._utils", "_rebuild_tensor_v2"), arguments)
        with pytest.raises(DataError):
            read_torch(save(call, tmp_path / "a.pt"))
    untyped = Storage(b"1234", Name("torch", "UntypedStorage"))
    with pytest.raises(DataError, match="without a storage or a dtype"):
        read_torch(save(tensor(np.zeros(1, "i4"), untyped), tmp_path / "a.pt"))
    program, _ = pickled(tensor(np.zeros(3)))
    with pytest.raises(DataError, match="data/0"):
        read_torch(save_pickle(program, [], tmp_path / "a.pt"))


def test_archives_that_are_too_much(tmp_path, monkeypatch):
    """A bomb is compressed, or its members overlap; torch.save does neither."""
    value = {"a": np.zeros(10**6)}
    with pytest.raises(DataError, match=r"is compressed, which torch.save never does"):
        read_torch(save(value, tmp_path / "a.pt", compression=zipfile.ZIP_DEFLATED))
    file = save([np.zeros(1000), np.ones(1000)], tmp_path / "b.pt")
    with zipfile.ZipFile(file) as archive:
        first, second = (archive.getinfo(f"archive/data/{key}") for key in (0, 1))
    content = bytearray(file.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"archive/data/1"))
    content[entry + 42 : entry + 46] = first.header_offset.to_bytes(4, "little")
    assert second.header_offset > first.header_offset
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged|overlap"):
        read_torch(file)
    monkeypatch.setattr(torch_file, "LARGEST_PICKLE", 10)
    with pytest.raises(DataError, match=r"data.pkl has .* bytes, more than 10"):
        read_torch(save(["x" * 20], tmp_path / "c.pt"))


def test_any_damage_is_one_line(tmp_path):
    """Whatever byte is another or missing: the same value, another one, or one line."""
    whole = (DUMPS / "sglang_per_token_rank1.pt").read_bytes()
    file = tmp_path / "a.pt"
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), random.integers(1, 4)):
            damaged[place] = random.integers(0, 256)
        file.write_bytes(damaged[: random.integers(len(whole) // 2, 2 * len(whole))])
        try:
            read_torch(file)
        except DataError as error:
            refused += 1
            assert "\n" not in str(error)
        except OSError:
            refused += 1
    assert refused > 50
    program, storages = pickled({"a": np.arange(5), "b": [1, "c", (2.5, None)]})
    for _ in range(150):
        damaged = bytearray(program)
        for place in random.integers(0, len(program), random.integers(1, 4)):
            damaged[place] = random.integers(0, 256)
        contents = [storage.content for storage in storages]
        try:
            read_torch(save_pickle(bytes(damaged), contents, file))
        except DataError as error:
            assert "\n" not in str(error)
