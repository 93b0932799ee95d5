"""`.safetensors` files: a JSON header, then arrays as they lie in memory; no library is needed."""

import json
import math
import operator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxhandler.data.readers.npy import rows_at
from jaxhandler.data.readers.reader import Stored, damaged, nested, stamp_of
from jaxhandler.errors import explain
from jaxhandler.files import blaming
from jaxhandler.tensors import LARGEST_HEADER, NAMES

__all__ = ["safetensors_reader"]

_TYPES = {
    code: np.dtype(getattr(jnp, name, name)).newbyteorder("<") for name, code in NAMES.items()
}


def safetensors_reader(path: Path) -> Any:
    """Returns the readers of the arrays in a `.safetensors` file, by name; one stands for itself.

    Args:
        path: The file.

    Returns:
        A reader, or a dict of them.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If an array has a type that NumPy and JAX do not have.
        ValueError: If the header makes no sense, or the file is shorter than it says.
    """
    stamp = stamp_of(path.stat())
    try:
        with open(path, "rb") as file, blaming(path):
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError(f"a header of {length} bytes, more than {LARGEST_HEADER}")
            text = file.read(length)
        if len(text) < length or not length:
            raise ValueError(f"a header of {len(text)} bytes, not {length}")
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        found = [_entry(key, entry) for key, entry in sorted(entries.items())]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(str(path), ".safetensors", error) from error
    columns = []
    for key, kind, shape, begin, end in found:
        name = f"{path}[{key!r}]"
        if kind not in _TYPES:
            fix = "Convert it before it is written."
            expected = f"one of {', '.join(_TYPES)}"
            raise TypeError(explain(name, seen=f"type {kind}", expected=expected, fix=fix))
        stored = Stored(shape, np.dtype(_TYPES[kind]))
        size = math.prod(shape) * stored.dtype.itemsize
        if min((0, *shape)) < 0 or begin < 0 or end - begin != size:
            raise damaged(name, ".safetensors", f"{end - begin} bytes for {kind}{list(shape)}")
        columns.append(([key], rows_at(name, path, stored, 8 + length + begin, stamp=stamp)))
    return nested(path, columns)


def _entry(key: str, entry: dict[str, Any]) -> tuple[str, str, tuple[int, ...], int, int]:
    begin, end = map(operator.index, entry["data_offsets"])
    return key, entry["dtype"], tuple(map(operator.index, entry["shape"])), begin, end
