"""Outputs that stay in memory: of the host, the device, or whoever takes them block by block."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.data.buffers import aligned_empty
from jaxhandler.errors import explain
from jaxhandler.trees import is_key, leaves_with_paths

__all__ = ["BlockSink", "DeviceSink", "HostSink"]


class HostSink:
    """Joins outputs in host memory, allocated once."""

    def __init__(self, specs: Any, row_axis: int) -> None:
        leaves = [_allocated(path, spec) for path, spec in leaves_with_paths(specs)]
        self._arrays = jax.tree.structure(specs).unflatten(leaves)
        self._axis = row_axis

    def write(self, start: int, pieces: list[Any]) -> None:
        before = (slice(None),) * self._axis
        wholes, leaves = jax.tree.leaves(self._arrays), jax.tree.leaves(pieces)
        for place, whole in enumerate(wholes):
            parts = [np.asarray(part) for part in leaves[place :: len(wholes)]]
            stop = start + sum([part.shape[self._axis] for part in parts])
            np.concatenate(parts, axis=self._axis, out=whole[(*before, slice(start, stop))])

    def finish(self) -> Any:
        return self._arrays

    def abort(self) -> None:
        self._arrays = None


def _allocated(path: str, spec: Any) -> np.ndarray:
    try:
        return aligned_empty(spec.shape, np.dtype(spec.dtype))
    except MemoryError as error:
        size = math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
        seen = f"{size:,} bytes for {spec.dtype}{list(spec.shape)}"
        fix = "Write them to a path with out=, or take them block by block."
        expected = "outputs that host memory has room for"
        text = explain("outputs", path=path, seen=seen, expected=expected, fix=fix)
        raise MemoryError(text) from error


class DeviceSink:
    """Joins outputs into JAX arrays; on CPU as they come, without any compiled operation."""

    def __init__(self, specs: Any, row_axis: int) -> None:
        self._specs, self._axis = specs, row_axis
        self._pieces: list[Any] = []
        self._host: HostSink | None = None

    def write(self, start: int, pieces: list[Any]) -> None:
        arrays = jax.tree.leaves(pieces[0])
        whole = arrays[0].shape == jax.tree.leaves(self._specs)[0].shape
        if whole or not all(map(_on_host, arrays)):
            return self._pieces.extend(pieces)
        if self._host is None:
            self._host = HostSink(self._specs, self._axis)
        self._host.write(start, pieces)

    def finish(self) -> Any:
        pieces, self._pieces = self._pieces, []
        if not pieces:
            sink, self._host = self._host or HostSink(self._specs, self._axis), None
            return jax.device_put(sink.finish())
        if len(pieces) == 1:
            return jax.device_put(pieces[0])
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=self._axis), *pieces)

    def abort(self) -> None:
        self._pieces, self._host = [], None


class BlockSink:
    """Keeps nothing: every write gives the block back, for those who consume them as they come."""

    def __init__(self, row_axis: int = 0) -> None:
        self._axis = row_axis

    def write(self, start: int, pieces: list[Any]) -> Any:
        def join(*parts: Any) -> np.ndarray:
            return np.concatenate([np.asarray(part) for part in parts], axis=self._axis)

        return jax.tree.map(join, *pieces)

    def finish(self) -> Any:
        return None

    def abort(self) -> None:
        pass


def _on_host(array: Any) -> bool:
    if isinstance(array, np.ndarray):
        return True
    if is_key(array):
        return False
    return all(device.platform == "cpu" for device in array.devices())
