"""Arrays in the safetensors format: a JSON header, then the arrays as they lie in memory."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxhandler.errors import explain

__all__ = ["LARGEST_HEADER", "NAMES", "decode", "encode"]

LARGEST_HEADER = 100_000_000
"""Bytes, as in the format's own library."""

NAMES = {
    "bool": "BOOL",
    "bfloat16": "BF16",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    **{f"{kind}int{8 * size}": f"{kind.upper() or 'I'}{8 * size}"
       for kind in ("", "u") for size in (1, 2, 4, 8)},
    **{f"float{8 * size}": f"F{8 * size}" for size in (2, 4, 8)},
}  # fmt: skip
_ALIGNMENT = 64


def encode(arrays: Mapping[str, np.ndarray]) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a safetensors file, in pieces that are not copied.

    A dtype that the format does not have (`int4`, `complex128`) is stored as bytes, its values
    on a last axis of their own.

    Args:
        arrays: By name.

    Yields:
        Pieces of the file, in order.

    Example:
        >>> decode(b"".join(encode({"w": np.arange(2)})), [("w", (2,), "int64")])[0]
        array([0, 1])
    """
    header: dict[str, Any] = {}
    start = 0
    for name, array in arrays.items():
        kind, shape = NAMES.get(array.dtype.name), list(array.shape)
        if kind is None:
            kind, shape = "U8", [*shape, array.dtype.itemsize]
        stop = start + array.nbytes
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    # The format wants a multiple of 8; of 64, the arrays that follow lie as XLA likes them.
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for array in arrays.values():
        if array.nbytes:
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def decode(
    data: bytes, kinds: Sequence[tuple[str, Sequence[int], str]], path: str = "data"
) -> list[np.ndarray]:
    """Returns arrays of a safetensors file, views of its bytes.

    Args:
        data: The file's bytes.
        kinds: Name, shape and dtype of each array wanted.
        path: How messages call the file.

    Returns:
        The arrays, in the order of `kinds`.

    Raises:
        ValueError: If an array is missing, is another one, or lies outside the file.
    """
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        if start - 8 > LARGEST_HEADER:
            raise ValueError(f"a header of {start - 8} bytes")
        header = json.loads(data[8:start])
        found = []
        for name, shape, kind in kinds:
            dtype = np.dtype(getattr(jnp, kind, kind))
            begin, end = header[name]["data_offsets"]
            stored = header[name]["dtype"], end - begin
            if stored != (NAMES.get(kind, "U8"), dtype.itemsize * int(np.prod(shape))):
                raise ValueError(f"{name!r} is {stored[0]} in {stored[1]} bytes")
            count = (end - begin) // dtype.itemsize
            if not 0 <= begin <= end <= len(data) - start:
                raise ValueError(f"{name!r} lies outside")
            found.append(np.frombuffer(data, dtype, count, start + begin).reshape(shape))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        seen = f"no valid safetensors file ({error})"
        raise ValueError(explain(path, seen=seen, expected="the arrays described")) from error
    return found
