"""Weights of TorchScript archives, such as OpenAI's own CLIP files, read without running any code of the archive.

`torch.jit.load` runs the methods by which the archive restores its objects, and TorchScript can read and write files.
Here only tensors are made. Every other name that the archive asks for becomes an empty object or is refused.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
_DEEPEST, _MOST_TENSORS = 40, 100_000
SIZES = ("input_resolution", "context_length", "vocab_size")
"""Sizes that OpenAI stored as tensors beside the weights."""


def is_archive(path: Path) -> bool:
    """Return True if a file is a TorchScript archive: a zip file with compiled code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(name.partition("/")[2].startswith("code/") for name in file.namelist())


def read_archive(path: Path) -> dict[str, Tensor]:
    """Return the tensors of an archive's module by their names in its state dict, floats in float32.

    Guarantee:
        No code of the archive runs, and no object is made except tensors, containers, numbers and texts.

    Raises:
        ValueError: If the file asks for anything else, or is damaged.
    """
    with zipfile.ZipFile(path) as file:
        root = next(name for name in file.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
        with file.open(f"{root}data.pkl") as stream:
            module = _Unpickler(stream, file, root).load()
    tensors = {}
    for count, (name, value) in enumerate(_tensors(module, "")):
        if count >= _MOST_TENSORS:  # parts that are shared many times would be listed for ever
            raise ValueError(f"the archive has more than {_MOST_TENSORS:,} tensors")
        tensors[name] = value
    for name in (*SIZES, *(name for name in tensors if name.endswith("attn_mask"))):
        tensors.pop(name, None)
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


class _Object:
    """Place of an object of the archive: its attributes, without its methods."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


class _Function:
    """Stand-in for a function of the archive; unlike a function, an archive cannot change it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise ValueError("the archive changes a function")

    def __setstate__(self, state: Any) -> None:
        raise ValueError("the archive changes a function")


def _tensors(node: Any, prefix: str, above: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a module and of its parts.

    Raises:
        ValueError: If parts contain each other, or lie deeper than modules do.
    """
    if isinstance(node, Tensor):
        yield prefix, node
    elif isinstance(node, _Object):
        if id(node) in above or len(above) > _DEEPEST:
            raise ValueError("the archive has a part that contains itself, or parts that lie too deep")
        for name, value in vars(node).items():
            yield from _tensors(value, f"{prefix}.{name}" if prefix else name, (*above, id(node)))


class _Unpickler(pickle.Unpickler):
    """Unpickler that makes tensors and `_Object` only."""

    def __init__(self, stream: Any, file: zipfile.ZipFile, root: str) -> None:
        super().__init__(stream)
        self._file, self._root, self._storages = file, root, dict[str, Tensor]()

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for a name of the archive.

        Raises:
            ValueError: If the name is none that an archive of weights needs.
        """
        if module.startswith("__torch__"):
            return _Object
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Function(_tensor)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch.jit._pickle" and name in _LISTS:
            return list
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return _Function(lambda value, _tag: value)
        raise ValueError(f"the archive asks for {module}.{name}, which is no weight")

    def persistent_load(self, pid: Any) -> Tensor:
        """Return the numbers of a storage, flat."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not str(key).isalnum():
            raise ValueError("the archive has a storage of an unknown kind")
        if key not in self._storages:
            content = bytearray(self._file.read(f"{self._root}data/{key}"))
            self._storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        if not 0 <= count <= len(self._storages[key]):
            raise ValueError("the archive has a storage that is too short")
        return self._storages[key]


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """Make a tensor of a storage; torch refuses one that reaches beyond it."""
    if not isinstance(storage, Tensor):
        raise ValueError("the archive has a tensor without a storage")
    if math.prod(size) > len(storage):
        raise ValueError("the archive has a tensor that is larger than its storage")
    return torch.as_strided(storage, tuple(size), tuple(stride), offset).clone()
