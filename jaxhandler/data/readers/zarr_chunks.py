"""Whether the chunks of a Zarr array are there: stores give the fill value where one is not."""

import itertools
import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxhandler.data.readers.advice import Watch
from jaxhandler.data.readers.intact import FOREIGN, Intact
from jaxhandler.data.readers.reader import is_damage
from jaxhandler.errors import explain

__all__ = ["Chunks"]

# Looked for before a run where that takes a moment; where there are more, as they are read.
_MOST_LOOKED_FOR = 10_000
_ABSENT = 2**64 - 1
_FILL = 'Restore it, or pass missing_chunks="fill" if the writer left out chunks of the fill value'


class Chunks:
    """The chunks of an array: where they lie, and what happens if one does not.

    Args:
        name: How messages call the array.
        array: A `zarr.Array`.
        missing: "raise" or "fill".
        said: As in `Watch`.
        intact: What tells that bytes are those that were written.

    Raises:
        ValueError: If the store is not local and a chunk is missing, or it cannot be known.
    """

    def __init__(
        self, name: str, array: Any, missing: str, said: set[str], intact: Intact = FOREIGN
    ) -> None:
        from zarr.storage import LocalStore

        self._intact = intact
        self._name, self._array, self._raise = name, array, missing == "raise"
        self._inner, self._outer = array.chunks, array.shards or array.chunks
        # Chunks of the array, and of a shard, along each axis.
        self._counts = _divide(array.shape, self._inner)
        self._per_shard = _divide(self._outer, self._inner)
        self.watch = Watch(name, said=said)
        self.in_files = isinstance(array.store, LocalStore)
        self._root = os.path.join(array.store.root, array.path) if self.in_files else ""
        if not self._raise:
            return
        if array.shards:
            codecs = [codec["name"] for codec in self._sharding()["index_codecs"]]
            if codecs != ["bytes", "crc32c"]:
                raise self._lacks(f"a shard index encoded by {codecs}")
        if not self.in_files and (lacking := array.nchunks - array.nchunks_initialized) > 0:
            raise self._lacks(f"{lacking} of {array.nchunks} chunks missing")

    def path(self, position: tuple[int, ...]) -> str:
        """Returns the file of a chunk or, where there are shards, of a shard."""
        return os.path.join(self._root, self._array.metadata.encode_chunk_key(position))

    def absent(self, path: str, row: int) -> Any:
        """Returns the value of rows whose file is not there, or refuses that."""
        if self._raise:
            raise self._lacks(f"no chunk {os.path.relpath(path, self._root)} for row {row}")
        return 0 if self._array.fill_value is None else self._array.fill_value

    def check(self) -> None:
        """Refuses the array if a chunk is missing, unless it has very many."""
        if math.prod(self._counts) <= _MOST_LOOKED_FOR:
            self._look(range(self._counts[0]), compare=False)

    def expect(self, indices: np.ndarray) -> None:
        """Takes note of a read of these rows, and refuses it if a chunk is missing or damaged."""
        blocks, asked = self._blocks(indices), len(indices)
        rows = min(self._inner[0], self._array.shape[0])
        pieces = len(blocks) * math.prod(self._counts[1:])
        self.watch.count(asked, len(blocks), rows, pieces)
        self._look(blocks, compare=True)

    def unreadable(self, indices: np.ndarray) -> str:
        """Returns which chunk of these rows cannot be decoded, after reading them has failed."""
        for block in self._blocks(indices):
            for rest in itertools.product(*map(range, self._counts[1:])):
                position = (block, *rest)
                spans = [
                    slice(place * size, (place + 1) * size)
                    for place, size in zip(position, self._inner, strict=True)
                ]
                try:
                    self._array[tuple(spans)]
                except Exception as error:  # Each codec has errors of its own.
                    if not is_damage(error):
                        raise
                    sizes = zip(position, self._inner, self._outer, strict=True)
                    file = self._array.metadata.encode_chunk_key(
                        tuple(place * inner // outer for place, inner, outer in sizes)
                    )
                    stop = min(spans[0].stop, self._array.shape[0])
                    return f"rows {spans[0].start} to {stop}, in {file}"
        return f"rows {indices.min()} to {indices.max() + 1}"

    def _blocks(self, indices: np.ndarray) -> list[int]:
        return np.unique(indices // self._inner[0]).tolist()

    def _look(self, blocks: Iterable[int], *, compare: bool) -> None:
        """Looks for all chunks that hold rows, given by their numbers along the rows."""
        compare = compare and self._intact is not FOREIGN
        if not self.in_files or not (self._raise or compare):
            return
        files = _divide(self._array.shape, self._outer)
        for first, group in itertools.groupby(blocks, lambda block: block // self._per_shard[0]):
            inside = [block % self._per_shard[0] for block in group]
            row = first * self._outer[0] + inside[0] * self._inner[0]
            for rest in itertools.product(*map(range, files[1:])):
                path = self.path((first, *rest))
                if compare and os.path.exists(path):
                    stop = min((first + 1) * self._outer[0], self._array.shape[0])
                    rows = first * self._outer[0], stop
                    self._intact.check(path, 0, rows=lambda *_, rows=rows: rows)
                if not self._raise:
                    continue
                # A folder is no chunk either, but zarr-python would fill its rows.
                if not os.path.isfile(path):
                    self.absent(path, row)
                elif self._array.shards:
                    self._look_inside(path, (first, *rest), inside)

    def _look_inside(self, path: str, position: tuple[int, ...], inside: list[int]) -> None:
        """Looks for inner chunks in the index of a shard; `inside` is which along the rows."""
        size = 16 * math.prod(self._per_shard)
        row = position[0] * self._outer[0] + inside[0] * self._inner[0]
        with open(path, "rb") as file:
            if self._sharding().get("index_location") != "start":
                file.seek(max(os.fstat(file.fileno()).st_size - size - 4, 0))
            index = np.frombuffer(file.read(size), np.uint8)
        if index.size < size:
            seen, expected = f"{index.size} bytes in {path}", f"a whole shard for row {row}"
            fix = "It was cut; write it again."
            raise ValueError(explain(self._name, seen=seen, expected=expected, fix=fix))
        present = index.view("<u8").reshape(*self._per_shard, 2)[..., 0] != _ABSENT
        within = [
            slice(0, count - place * shard)
            for count, place, shard in zip(
                self._counts[1:], position[1:], self._per_shard[1:], strict=True
            )
        ]
        for block in inside:
            if not present[(block, *within)].all():
                row = position[0] * self._outer[0] + block * self._inner[0]
                shard = os.path.relpath(path, self._root)
                raise self._lacks(f"no chunk for row {row} in the shard {shard}")

    def _sharding(self) -> Any:
        return self._array.metadata.to_dict()["codecs"][0]["configuration"]

    def _lacks(self, seen: str) -> ValueError:
        fix = f"{_FILL} ({self._array.fill_value!s})."
        return ValueError(explain(self._name, seen=seen, expected="every chunk", fix=fix))


def _divide(sizes: tuple[int, ...], parts: tuple[int, ...]) -> list[int]:
    return [-(-size // max(part, 1)) for size, part in zip(sizes, parts, strict=True)]
