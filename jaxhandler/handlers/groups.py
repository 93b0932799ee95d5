"""Members of an ensemble in groups, each of which goes over a macrobatch by itself."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxhandler.data.buffers import aligned_empty
from jaxhandler.data.stream import Lane
from jaxhandler.trees import is_key, leaf_axes
from jaxhandler.typing import Step

__all__ = ["Groups", "Hands", "ManyStep", "as_here", "num_cores"]


class ManyStep(ABC):
    """A step of many members, `(consts, carry, batch) -> (carry, out)`, to be had of fewer too.

    Members lie on the first axis of every leaf of `consts` and of `out`.
    """

    @abstractmethod
    def __call__(self, consts: Any, carry: Any, batch: Any, /) -> tuple[Any, Any]: ...

    @abstractmethod
    def group_size(self, consts: Any, carry: Any, data: Any, hands: int) -> int:
        """Returns how many members are best computed at once, checking that all are there.

        Args:
            consts: Of all members.
            carry: Of all members, without key types.
            data: Types of the rows of a batch.
            hands: Groups that are computed at a time.
        """

    @abstractmethod
    def part(self, size: int) -> Step:
        """Returns the step of `size` of the members, the same one whenever it is asked for."""


class Groups:
    """Which members are computed at once; one group of all, unless there are several.

    The last group overlaps the one before where members do not divide, so that one plan fits all.

    Args:
        members: How many there are, `E`.
        size: How many a group has.
        carry_axes: Where members are in the carry, as `jax.vmap` takes it.
        axis: Where they are in the outputs of a macrobatch.

    Attributes:
        whole: Whether there is only one.

    Example:
        >>> groups = Groups(5, 2, 0, 0)
        >>> consts, carries = groups.cut((), np.arange(5, dtype=np.float32))
        >>> [carry.tolist() for carry in carries]
        [[0.0, 1.0], [2.0, 3.0], [3.0, 4.0]]
        >>> groups.joined_carry(carries)
        Array([0., 1., 2., 3., 4.], dtype=float32)
    """

    def __init__(self, members: int, size: int, carry_axes: Any, axis: int) -> None:
        self._members, self._size, self._axis = members, size, axis
        self._carry_axes = carry_axes
        starts = [min(start, members - size) for start in range(0, members, size)]
        self._parts = [slice(start, start + size) for start in starts]
        self._overlap = len(starts) * size - members
        self.whole = len(starts) == 1

    def of(self, step: Any) -> Step:
        """Returns the step of a group, of a `ManyStep`."""
        return step.part(self._size)

    def __len__(self) -> int:
        return len(self._parts)

    def cut(self, consts: Any, carry: Any) -> tuple[list[Any], list[Any]]:
        """Returns what each group is given; views of NumPy, where there are several."""
        if self.whole:
            return [consts], [carry]
        # Plans would copy views that XLA cannot take as they lie at every call.
        put = jax.device_put(self._cut(consts, 0))
        return put, self._cut(carry, self._carry_axes)

    def joined_carry(self, carries: list[Any]) -> Any:
        """Returns the carry of all members; what they share is that of the first group."""
        if self.whole:
            return carries[0]
        structure = jax.tree.structure(carries[0])
        axes = leaf_axes(self._carry_axes, carries[0])
        columns = zip(*map(jax.tree.leaves, carries), strict=True)
        leaves = [
            column[0] if axis is None else self._joined(axis, *column)
            for axis, column in zip(axes, columns, strict=True)
        ]
        return structure.unflatten(jax.device_put(leaves))

    def joined_outputs(self, pieces: list[list[Any] | None]) -> list[Any] | None:
        """Returns the outputs of a macrobatch of all members, from those of each group."""
        first, *rest = pieces
        if first is None or not rest:
            return first
        join_all = lambda *column: self._joined(self._axis, *column)  # noqa: E731
        return [jax.tree.map(join_all, *each) for each in zip(*filter(None, pieces), strict=True)]

    def joined_types(self, out: Any) -> Any:
        """Returns the types of a step's output of all members, from those of a group."""
        if self.whole:
            return out
        widen = lambda leaf: jax.ShapeDtypeStruct((self._members, *leaf.shape[1:]), leaf.dtype)  # noqa: E731
        return jax.tree.map(widen, out)

    def _cut(self, tree: Any, axes: Any) -> list[Any]:
        leaves, structure = jax.tree.flatten(tree)
        columns = [
            [leaf] * len(self) if axis is None else self._views(np.asarray(leaf), axis)
            for leaf, axis in zip(leaves, leaf_axes(axes, tree), strict=True)
        ]
        numbers = range(len(self))
        return [structure.unflatten(column[number] for column in columns) for number in numbers]

    def _views(self, leaf: np.ndarray, axis: int) -> list[np.ndarray]:
        before = (slice(None),) * (axis % leaf.ndim)
        return [leaf[(*before, part)] for part in self._parts]

    def _joined(self, axis: int, *column: Any) -> Any:
        if is_key(column[0]):
            numbers = self._joined(axis, *map(jax.random.key_data, column))
            return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(column[0]))
        arrays = [np.asarray(leaf) for leaf in column]
        if self._overlap:
            before = (slice(None),) * (axis % arrays[-1].ndim)
            arrays[-1] = arrays[-1][(*before, slice(self._overlap, None))]
        shape = list(arrays[0].shape)
        shape[axis] = sum(array.shape[axis] for array in arrays)
        return np.concatenate(arrays, axis, out=aligned_empty(tuple(shape), arrays[0].dtype))


class Hands:
    """Threads that hand work to the device.

    XLA on CPU computes in turn what one thread hands to it, and side by side what several do.

    Args:
        count: How many, with the first one, which is the thread that asks for the result.
    """

    def __init__(self, count: int) -> None:
        names = [None, *(f"jaxhandler-hand-{number}" for number in range(1, count))]
        self._lanes, self.closed = [Lane(name) for name in names], False

    def submit(self, number: int, fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        """Hands over a call; calls whose numbers agree, modulo the hands, come in turn.

        Args:
            number: Any.
            fn: What to call.
            *args: What with.

        Returns:
            A function that waits for the result or raises its error.
        """
        return self._lanes[number % len(self._lanes)].submit(as_here(fn), *args)

    def close(self) -> None:
        """Ends the threads; calls that have begun may look at `closed`, and leave."""
        self.closed = True
        for lane in self._lanes:
            lane.close()


def as_here(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that calls plans of this thread in another one.

    Threads that begin inside `with jax.enable_x64(True)` do not know of it, and plans look.

    Args:
        fn: What calls them.

    Example:
        >>> import threading
        >>> with jax.enable_x64(True):
        ...     wide = as_here(lambda: print(jax.config.jax_enable_x64))
        >>> thread = threading.Thread(target=wide)
        >>> thread.start(), thread.join()
        True
        (None, None)
    """
    config: Any = jax.config
    wide = config.jax_enable_x64

    def run(*args: Any) -> Any:
        if config.jax_enable_x64 == wide:
            return fn(*args)
        with jax.enable_x64(wide):
            return fn(*args)

    return run


def num_cores() -> int:
    """Returns how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # Not everywhere.
        return os.cpu_count() or 1
