"""The search for pairs of many structures, piece by piece, in this process or in several."""

import math
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import IO, Any, NamedTuple

import numpy as np

from jaxhandler.assembly.neighbors import pair_finder, sorted_pairs
from jaxhandler.data.writers.npy import write_header
from jaxhandler.errors import explain

__all__ = ["FoundPairs", "Piece", "search", "serve"]

_SERVE = "from jaxhandler.assembly.searching import serve; serve()"


class Piece(NamedTuple):
    """Some structures, one after the other.

    Attributes:
        num_atoms: int64 `[n]`.
        positions: float64 `[sum of num_atoms, 3]`.
        cells: float64 `[n, 3, 3]`.
        pbc: bool `[n, 3]`.
    """

    num_atoms: np.ndarray
    positions: np.ndarray
    cells: np.ndarray
    pbc: np.ndarray


class FoundPairs(NamedTuple):
    """The pairs of some structures, one after the other.

    Attributes:
        num_pairs: int64 `[n]`.
        pair_first: int32 `[sum of num_pairs]`, atoms numbered within their structure.
        pair_second: Likewise.
        pair_shift: `[sum of num_pairs, 3]`, of the narrowest signed type that holds it.
    """

    num_pairs: np.ndarray
    pair_first: np.ndarray
    pair_second: np.ndarray
    pair_shift: np.ndarray


def search(pieces: Iterator[Piece], cutoff: float, workers: int) -> Iterator[FoundPairs]:
    """Yields the pairs of the structures of each piece, in the order of the pieces.

    Workers are processes: vesin lets one thread in at a time.

    Args:
        pieces: Structures.
        cutoff: The cutoff.
        workers: How many processes search; 1 for this one.

    Yields:
        Pairs, sorted within each structure.

    Raises:
        ImportError: If neither vesin nor ase is installed.
        RuntimeError: If a worker ended early; what it said is on its standard error.
    """
    find = pair_finder(cutoff, threads=1)
    if workers == 1:
        yield from (_search_piece(find, piece) for piece in pieces)
        return
    with ExitStack() as stack:
        idle = deque(stack.enter_context(_worker(cutoff)) for _ in range(workers))
        pool = stack.enter_context(ThreadPoolExecutor(workers, "jaxhandler-pairs"))

        def ask(piece: Piece) -> FoundPairs:
            worker = idle.pop()
            try:
                return FoundPairs(*_ask(worker, piece))
            finally:
                idle.append(worker)

        running: deque[Future[FoundPairs]] = deque()
        for piece in pieces:
            running.append(pool.submit(ask, piece))
            if len(running) > 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def serve() -> None:
    """Searches pieces from standard input until it ends; what a worker runs."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # What a library prints would get between the answers.
    find = pair_finder(float(sys.argv[1]), threads=1)
    while (piece := _receive(sys.stdin.buffer, len(Piece._fields))) is not None:
        _send(answers, _search_piece(find, Piece(*piece)))


def _search_piece(find: Callable[..., Any], piece: Piece) -> FoundPairs:
    ends = np.cumsum(piece.num_atoms).tolist()
    each = zip([0, *ends], ends, piece.cells, piece.pbc, strict=False)
    found = [find(piece.positions[low:high], cell, pbc) for low, high, cell, pbc in each]
    num_pairs = np.array([len(pairs) for pairs, _ in found], np.int64)
    pairs = np.concatenate([pairs for pairs, _ in found])
    shift = np.concatenate([shift for _, shift in found])
    first, second, shift = sorted_pairs(pairs, shift, piece.num_atoms, num_pairs)
    low, high = (int(shift.min()), int(shift.max())) if shift.size else (0, 0)
    # Of -129 and of -1 - 128 the narrowest types are the same.
    dtype = np.result_type(np.int8, np.min_scalar_type(min(low, -1 - high)))
    return FoundPairs(num_pairs, first, second, shift.astype(dtype))


def _worker(cutoff: float) -> "subprocess.Popen[bytes]":
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return subprocess.Popen(
        [sys.executable, "-c", _SERVE, repr(cutoff)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )


def _ask(worker: "subprocess.Popen[bytes]", piece: Piece) -> list[np.ndarray]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        _send(worker.stdin, piece)
        found = _receive(worker.stdout, len(FoundPairs._fields))
    except OSError:
        found = None
    if found is None:
        seen, fix = "a worker that ended early", "See what it said, or use workers=1."
        raise RuntimeError(explain("workers", seen=seen, expected="its pairs", fix=fix))
    return found


def _send(file: IO[bytes], arrays: tuple[np.ndarray, ...]) -> None:
    for array in arrays:
        write_header(file, array.shape, array.dtype)
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    file.flush()


def _receive(file: IO[bytes], count: int) -> list[np.ndarray] | None:
    """Returns so many arrays, or None where the other side has closed."""
    arrays = []
    for _ in range(count):
        try:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        except ValueError:  # At the end there is no header.
            return None
        size = math.prod(shape) * dtype.itemsize
        values = file.read(size)
        if len(values) < size:
            return None
        arrays.append(np.frombuffer(values, dtype).reshape(shape))
    return arrays
