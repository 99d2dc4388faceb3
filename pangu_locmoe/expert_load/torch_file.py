"""Read what `torch.save` wrote, without PyTorch and without running anything that is in the file.

A .pt file is a zip of stored, not compressed, members: `NAME/data.pkl`, a pickle in which each
storage is a persistent id ("storage", its class, KEY, device, length), `NAME/data/KEY` with the
bytes of each storage, and `NAME/byteorder`. A pickle is a program. This reader knows the few
instructions that build numbers, text and containers, and the few names that build tensors;
whatever else a file asks for ends the reading before it happens. Tensors become NumPy arrays that
cannot be written to; bfloat16 becomes float32. The format of before PyTorch 1.6 is refused.

Letters: X any axes.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.errors import DataError, one_line

LARGEST_PICKLE = 2**28  # bytes of data.pkl
LARGEST_VIEW = 2**24  # numbers of a tensor that repeats those of its storage

BFLOAT16 = "bfloat16"
# by the name of a storage's class without "Storage"
_CLASSES = {
    "Double": "f8",
    "Float": "f4",
    "Half": "f2",
    "BFloat16": BFLOAT16,
    "Long": "i8",
    "Int": "i4",
    "Short": "i2",
    "Char": "i1",
    "Byte": "u1",
    "Bool": "?",
    "ComplexFloat": "c8",
    "ComplexDouble": "c16",
}
# by the name of a torch.dtype
_DTYPES = {
    "float64": "f8",
    "float32": "f4",
    "float16": "f2",
    BFLOAT16: BFLOAT16,
    "int64": "i8",
    "int32": "i4",
    "int16": "i2",
    "int8": "i1",
    "uint64": "u8",
    "uint32": "u4",
    "uint16": "u2",
    "uint8": "u1",
    "bool": "?",
    "complex64": "c8",
    "complex128": "c16",
}


_CODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.LONG4),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_DICT, pickle.DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BINPERSID),
)


@dataclass(frozen=True)
class _Kind:
    """A storage class or a dtype; `code` None: bytes whose dtype the tensor tells."""

    code: str | None


class _Storage(NamedTuple):
    content: bytes
    code: str | None
    order: Literal["<", ">"]


def read_torch(path: Path) -> Any:
    """What was saved: None, numbers, text, bytes, tuples, lists, sets, dicts, and an array for each
    tensor.

    Raises DataError in one line: it is damaged, of the old format, or holds anything else; what it
    is, by its name. Raises OSError.
    """
    with path.open("rb") as file:
        head = file.read(2)
    if head == b"\x80\x02":
        raise DataError("is in torch.save's format of before PyTorch 1.6: save it again, as a zip")
    if head != b"PK":
        raise DataError("not a zip archive as torch.save writes it")
    try:
        with zipfile.ZipFile(path) as archive:
            return _Reader(_Members(archive, path.stat().st_size)).load()
    except (DataError, OSError):
        raise
    # a damaged pickle or archive can raise almost anything
    except Exception as error:
        raise DataError(f"a damaged file of torch.save: {one_line(error)}") from None


class _Members:
    """Members of the archive, which are stored as they are: what is read in all is no more than the
    file is long, so that overlapping members cannot fill the memory.
    """

    def __init__(self, archive: zipfile.ZipFile, length: int) -> None:
        self._archive = archive
        self._left = length
        pickles = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise DataError("has no data.pkl as torch.save writes it")
        self._folder = pickles[0].split("/")[0]

    def read(self, name: str, largest: int | None = None) -> bytes:
        info = self._archive.getinfo(f"{self._folder}/{name}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise DataError(f"{name} is compressed, which torch.save never does")
        if largest is not None and info.file_size > largest:
            raise DataError(f"{name} has {info.file_size} bytes, more than {largest}")
        self._left -= info.file_size
        if self._left < 0:
            raise DataError("its members overlap")
        return self._archive.read(info)

    @property
    def order(self) -> Literal["<", ">"]:
        name = f"{self._folder}/byteorder"
        big = name in self._archive.namelist() and self.read("byteorder") == b"big"
        return ">" if big else "<"


class _Instructions(dict[int, Callable[..., None]]):
    """Those of Python's own unpickler that build numbers, text and containers, keep what was built
    and call one of the names below. None that makes an object or sets its state.
    """

    def __init__(self) -> None:
        known = pickle._Unpickler.dispatch  # type: ignore[attr-defined]
        super().__init__((code[0], known[code[0]]) for code in _CODES)

    def __missing__(self, code: int) -> Callable[..., None]:
        raise DataError(f"holds the pickle instruction {bytes([code])!r}: not read")


class _Reader(pickle._Unpickler):  # type: ignore[name-defined]
    """The unpickler that is written in Python: its table of instructions can be cut, and one large
    index cannot make its memo take gigabytes, as it can in C.
    """

    dispatch = _Instructions()

    def __init__(self, members: _Members) -> None:
        super().__init__(io.BytesIO(members.read("data.pkl", LARGEST_PICKLE)))
        self._members = members
        self._order = members.order
        self._storages: dict[str, bytes] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = _known(module, name)
        if known is None:
            full = f"{module}.{name}"
            raise DataError(
                f"holds {full[:80]!r}, which is neither a tensor nor a plain container: not read"
            )
        return known

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage, read once for all tensors that share it. Its device does not matter here."""
        tag, kind, key, _, _ = pid
        if tag != "storage" or not isinstance(kind, _Kind) or not isinstance(key, str):
            raise DataError("a damaged file of torch.save: an unknown persistent id")
        if key not in self._storages:
            self._storages[key] = self._members.read(f"data/{key}")
        return _Storage(self._storages[key], kind.code, self._order)


def _rebuild(
    storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, code: str | None = None
) -> NDArray[Any]:
    """A tensor: a view into its storage, in numbers and not in bytes.

    Raises DataError: it is not within the storage.
    """
    code = code or getattr(storage, "code", None)
    if not isinstance(storage, _Storage) or code is None:
        raise DataError("a tensor without a storage or a dtype")
    packed = np.dtype("u2" if code == BFLOAT16 else code).newbyteorder(storage.order)
    flat = np.frombuffer(storage.content, packed)
    size, stride = tuple(size), tuple(stride)
    if len(size) != len(stride) or any(
        type(value) is not int or value < 0 for value in (offset, *size, *stride)
    ):
        raise DataError(f"a tensor of size {size} and stride {stride}")
    numbers = int(np.prod(size, dtype=object)) if size else 1
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if numbers > max(len(flat), LARGEST_VIEW) or (numbers and last >= len(flat)):
        raise DataError(f"a tensor of size {size} at {offset} in a storage of {len(flat)} numbers")
    view_X = np.lib.stride_tricks.as_strided(
        flat[offset:] if numbers else flat[:0],
        size,
        [step * packed.itemsize for step in stride],
        writeable=False,
    )
    if code == BFLOAT16:
        tensor_X = (view_X.astype(np.uint32) << 16).view(np.float32)
    else:
        tensor_X = view_X.astype(packed.newbyteorder("="), copy=False)
    tensor_X.flags.writeable = False
    return tensor_X


def _rebuild_with_dtype(*arguments: Any) -> NDArray[Any]:
    """(storage, offset, size, stride, requires_grad, hooks, dtype, metadata)"""
    kind = arguments[6]
    return _rebuild(*arguments[:4], code=kind.code if isinstance(kind, _Kind) else None)


def _parameter(tensor: Any, *rest: Any) -> Any:
    return tensor


def _encoded(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 hold bytes."""
    if encoding != "latin1":
        raise DataError(f"bytes encoded in {encoding!r}, which torch.save never does")
    return text.encode("latin1")


def _device(*arguments: Any) -> str:
    return ":".join(map(str, arguments))


_BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_with_dtype,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch_npu.utils.storage", "_rebuild_npu_tensor"): _rebuild,
    ("torch", "Size"): tuple,
    ("torch", "device"): _device,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encoded,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
}


def _known(module: str, name: str) -> Any:
    module = "builtins" if module == "__builtin__" else module
    if (module, name) in _BUILDERS:
        return _BUILDERS[module, name]
    if module == "torch" and name in _DTYPES:
        return _Kind(_DTYPES[name])
    if module in ("torch", "torch.storage") and name == "UntypedStorage":
        return _Kind(None)
    if module in ("torch", "torch.cuda") and name.endswith("Storage"):
        code = _CLASSES.get(name[: -len("Storage")])
        return None if code is None else _Kind(code)
    return None
