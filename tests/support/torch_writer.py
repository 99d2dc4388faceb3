"""Files as torch.save writes them, by the definition of the format and without PyTorch: a zip of
stored members, a pickle of protocol 2 whose tensors call torch's functions by name, and the bytes
of each storage.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {
    "f8": "DoubleStorage",
    "f4": "FloatStorage",
    "f2": "HalfStorage",
    "i8": "LongStorage",
    "i4": "IntStorage",
    "i2": "ShortStorage",
    "i1": "CharStorage",
    "u1": "ByteStorage",
    "b1": "BoolStorage",
    "c8": "ComplexFloatStorage",
    "c16": "ComplexDoubleStorage",
}


@dataclass(frozen=True)
class Name:
    """What a pickle names as module and name, which need not exist here."""

    module: str
    name: str

    def __call__(self) -> None:
        """For the pickler, which asks whether what is called can be."""


@dataclass(frozen=True)
class Call:
    """A call of a name that a pickle makes when it is read."""

    function: Name
    arguments: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Storage:
    content: bytes
    kind: Name
    device: str = "cpu"


def tensor(array: Any, storage: Storage | None = None, offset: int = 0, stride: Any = None) -> Call:
    """An array as torch pickles a tensor: a view into its storage."""
    array = np.asarray(array)
    if storage is None:
        kind = Name("torch", STORAGES[array.dtype.str[1:]])
        storage = Storage(np.ascontiguousarray(array).tobytes(), kind)
    if stride is None:
        stride = tuple(
            step // array.itemsize for step in np.empty(array.shape, array.dtype).strides
        )
    hooks = Call(Name("collections", "OrderedDict"), ())
    return Call(
        Name("torch._utils", "_rebuild_tensor_v2"),
        (storage, offset, array.shape, stride, False, hooks),
    )


class _Pickler(pickle._Pickler):  # type: ignore[name-defined]
    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.storages: list[Storage] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Storage):
            return None
        if obj not in self.storages:
            self.storages.append(obj)
        key = str(self.storages.index(obj))
        return ("storage", obj.kind, key, obj.device, len(obj.content))

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Name):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save_reduce(obj.function, obj.arguments)
        elif isinstance(obj, np.ndarray):
            self.save(tensor(obj))
        else:
            super().save(obj, save_persistent_id)


def pickled(value: Any, protocol: int = 2) -> tuple[bytes, list[Storage]]:
    file = io.BytesIO()
    pickler = _Pickler(file, protocol)
    pickler.dump(value)
    return file.getvalue(), pickler.storages


def save(
    value: Any,
    path: Path,
    order: str = "little",
    protocol: int = 2,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Write a value, arrays in it as tensors."""
    program, storages = pickled(value, protocol)
    return save_pickle(program, [storage.content for storage in storages], path, order, compression)


def save_pickle(
    program: bytes,
    contents: list[bytes],
    path: Path,
    order: str = "little",
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Write an archive with this pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", order)
        for key, content in enumerate(contents):
            archive.writestr(f"archive/data/{key}", content)
        archive.writestr("archive/version", "3\n")
    return path
