"""From a function of one member to one of all: at once, some after others, or over devices."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxhandler.errors import explain, form
from jaxhandler.trees import leaf_axes, leaves_with_paths

__all__ = [
    "Strategy",
    "check_axes",
    "check_member_sharding",
    "of_member",
    "over_members",
    "stack_outs",
]


class Strategy(NamedTuple):
    """How members are computed.

    Attributes:
        name: "vmap" computes all at once, "map" some at a time, one lot after another, "loop" each
            by itself, unrolled; "groups" are no function: a run has each go over many batches.
        chunk: Members at a time of a "map", or of a group.

    Example:
        >>> str(Strategy("map", 10)), str(Strategy("vmap"))
        ('map of 10', 'vmap')
    """

    name: str
    chunk: int = 1

    def __str__(self) -> str:
        return f"{self.name} of {self.chunk}" if self.name in ("map", "groups") else self.name


def over_members(
    fn: Callable[..., Any],
    in_axes: tuple[Any, ...],
    out_axes: Any,
    strategy: Strategy,
    members: int,
    sharding: NamedSharding | None = None,
) -> Callable[..., Any]:
    """Returns the function of all members that `fn` is for one.

    Args:
        fn: A pure function.
        in_axes: One tree prefix per argument, as `jax.vmap` takes them: where members are, counted
            from the last axis if negative, or None for what they share.
        out_axes: A tree prefix of its result likewise; None for what depends on no member.
        strategy: How.
        members: How many there are, `E`.
        sharding: Names the mesh axis that members are laid over; None for one device.

    Returns:
        A function of as many arguments, traceable and differentiable.

    Example:
        >>> double = over_members(lambda w, x: w * x, (0, None), 0, Strategy("map"), 2)
        >>> double(jnp.array([2.0, 3.0]), jnp.float32(4))
        Array([ 8., 12.], dtype=float32)
    """
    if sharding is not None:
        return _sharded(fn, in_axes, out_axes, strategy, members, sharding)
    if strategy.name == "vmap":
        return jax.vmap(fn, in_axes, out_axes, axis_size=members)
    run = _mapped if strategy.name == "map" else _looped
    return run(fn, in_axes, out_axes, members, strategy.chunk)


def check_axes(name: str, tree: Any, axes: Any, members: int) -> None:
    """Refuses a tree of which a leaf does not have all members where they should be.

    Args:
        name: How messages call `tree`.
        tree: Arrays or tracers.
        axes: Where members are, a prefix of `tree`; None for leaves they share.
        members: `E`.

    Raises:
        ValueError: If a leaf has another size there; names its path.

    Example:
        >>> check_axes("data", jnp.zeros((8, 3)), 1, 3)
    """
    paths = leaves_with_paths(tree)
    for (path, leaf), axis in zip(paths, leaf_axes(axes, tree), strict=True):
        if axis is None:
            continue
        if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] != members:
            seen = form(leaf)
            expected = f"{members} members along axis {axis}"
            fix = "Use jh.stack or jh.replicate, or make an ensemble of as many with jh.ensemble."
            raise ValueError(explain(name, path=path, seen=seen, expected=expected, fix=fix))


def check_member_sharding(sharding: Any) -> NamedSharding | None:
    """Refuses what does not say which one axis of a mesh members are laid over.

    Args:
        sharding: None, or a resolved sharding.

    Returns:
        `sharding`, on a mesh whose axes are not part of the types of arrays: arguments that lie
        elsewhere are laid out where a plan begins, which an explicit axis would refuse.

    Raises:
        ValueError: If it is on one device, or splits another axis than the first.
    """
    if sharding is None:
        return None
    spec = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
    if len(spec) != 1 or not isinstance(spec[0], str):
        fix = 'Pass NamedSharding(mesh, PartitionSpec("members")).'
        expected = "the name of one mesh axis for the member axis"
        raise ValueError(explain("sharding", seen=str(sharding), expected=expected, fix=fix))
    mesh = sharding.mesh
    if isinstance(mesh, Mesh):
        mesh = Mesh(mesh.devices, mesh.axis_names)
    return NamedSharding(mesh, sharding.spec)


def _mapped(
    fn: Callable[..., Any], in_axes: Any, out_axes: Any, members: int, chunk: int
) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        leaves, structure, axes = _split(in_axes, args)

        def one(xs: tuple[Any, list[Any]]) -> Any:
            return fn(*structure.unflatten(_merged(leaves, axes, xs[1])))

        own = [
            jnp.moveaxis(leaf, axis, 0)
            for leaf, axis in zip(leaves, axes, strict=True)
            if axis is not None
        ]
        # Counted as well: a model may have no parameters, and then nothing else tells how many.
        xs = np.arange(members, dtype=np.int32), own
        out = jax.lax.map(one, xs, batch_size=min(chunk, members) if chunk > 1 else None)
        leaves, structure, axes = _split(out_axes, out)
        return structure.unflatten(
            leaf[0] if axis is None else jnp.moveaxis(leaf, 0, axis)
            for leaf, axis in zip(leaves, axes, strict=True)
        )

    return run


def _looped(
    fn: Callable[..., Any], in_axes: Any, out_axes: Any, members: int, chunk: int
) -> Callable[..., Any]:
    one = of_member(fn, in_axes)

    def run(*args: Any) -> Any:
        return stack_outs([one(np.int32(member), *args) for member in range(members)], out_axes)

    return run


def of_member(fn: Callable[..., Any], in_axes: Any) -> Callable[..., Any]:
    """Returns `run(member, *args)`, which cuts one member out of stacked arguments and calls `fn`.

    Example:
        >>> of_member(lambda w: 2 * w, (0,))(np.int32(1), jnp.array([3.0, 4.0]))
        Array(8., dtype=float32)
    """

    def run(member: Any, *args: Any) -> Any:
        leaves, structure, axes = _split(in_axes, args)
        cut = lambda leaf, axis: jax.lax.dynamic_index_in_dim(leaf, member, axis, keepdims=False)  # noqa: E731
        return fn(
            *structure.unflatten(
                leaf if axis is None else cut(leaf, axis)
                for leaf, axis in zip(leaves, axes, strict=True)
            )
        )

    return run


def stack_outs(outs: list[Any], out_axes: Any) -> Any:
    """Returns the results of single members as one, with members where `out_axes` says."""
    _, structure, axes = _split(out_axes, outs[0])
    columns = zip(*map(jax.tree.leaves, outs), strict=True)
    return structure.unflatten(
        column[0] if axis is None else jnp.stack(column, axis)
        for column, axis in zip(columns, axes, strict=True)
    )


def _sharded(
    fn: Callable[..., Any],
    in_axes: Any,
    out_axes: Any,
    strategy: Strategy,
    members: int,
    sharding: NamedSharding,
) -> Callable[..., Any]:
    """Automatic partitioning gathers what grouped convolutions need; a shard_map never does."""
    mesh, name = sharding.mesh, sharding.spec[0]
    parts = mesh.shape[name]
    each = -(-members // parts)
    # Where members do not divide, the last one is computed again, and cut off.
    filled = np.minimum(np.arange(each * parts), members - 1)

    def spec(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, name)

    def run(*args: Any) -> Any:
        outs = out_axes
        if any(axis < 0 for axis in jax.tree.leaves(out_axes)):
            every = jax.vmap(fn, in_axes, out_axes, axis_size=members)
            outs = _from_first(out_axes, jax.eval_shape(every, *args))
        leaves, structure, axes = _split(_from_first(in_axes, args), args)
        inner = over_members(fn, structure.unflatten(axes), outs, strategy, each)
        if len(filled) != members:
            leaves = [
                leaf if axis is None else jnp.take(leaf, filled, axis=axis)
                for leaf, axis in zip(leaves, axes, strict=True)
            ]
        out = jax.shard_map(
            inner,
            mesh=mesh,
            in_specs=structure.unflatten(spec(axis) for axis in axes),
            out_specs=jax.tree.map(spec, outs, is_leaf=lambda axis: axis is None),
            check_vma=False,
        )(*structure.unflatten(leaves))
        if len(filled) == members:
            return out
        cut = lambda leaf, axis: jax.lax.slice_in_dim(leaf, 0, members, axis=axis)  # noqa: E731
        leaves, structure, axes = _split(outs, out)
        return structure.unflatten(
            leaf if axis is None else cut(leaf, axis)
            for leaf, axis in zip(leaves, axes, strict=True)
        )

    return run


def _from_first(axes: Any, tree: Any) -> Any:
    """Returns the axis of each leaf counted from the first one."""
    leaves, structure, axes = _split(axes, tree)
    return structure.unflatten(
        axis if axis is None else axis % leaf.ndim for leaf, axis in zip(leaves, axes, strict=True)
    )


def _split(axes: Any, tree: Any) -> tuple[list[Any], Any, list[int | None]]:
    leaves, structure = jax.tree.flatten(tree)
    return leaves, structure, leaf_axes(axes, tree)


def _merged(leaves: list[Any], axes: list[int | None], own: list[Any]) -> Iterator[Any]:
    """Yields what members share, and in its places what is one member's own."""
    parts = iter(own)
    for leaf, axis in zip(leaves, axes, strict=True):
        yield leaf if axis is None else next(parts)
