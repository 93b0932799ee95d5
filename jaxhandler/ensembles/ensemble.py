"""A handler of many models at once: the same handler, its step over stacked members."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxhandler.data.placement import replicate_like, resolve_sharding
from jaxhandler.ensembles.members import check_members
from jaxhandler.ensembles.reductions import reduction
from jaxhandler.ensembles.steps import MembersLayout, MembersStep
from jaxhandler.ensembles.strategies import check_member_sharding
from jaxhandler.ensembles.trials import Strategies
from jaxhandler.errors import a_type, check_choice, check_count, explain
from jaxhandler.handlers.calculator import Calculator
from jaxhandler.handlers.handler import Handler
from jaxhandler.handlers.program import Program
from jaxhandler.handlers.trainer import Trainer
from jaxhandler.handlers.training import as_key, default_order_key
from jaxhandler.handlers.validator import Validator
from jaxhandler.models.rewriting import FastProducts, rewritten
from jaxhandler.trees import leaf_axes
from jaxhandler.typing import Placement, Step

__all__ = ["ensemble"]

H = TypeVar("H", bound=Handler)

_ORDERS = {False: None, True: "shuffle", "shuffle": "shuffle", "bootstrap": "bootstrap"}


def ensemble(
    handler: H,
    *,
    members: int,
    member_data: bool = False,
    member_order: bool | str = False,
    reduce: str | Callable[[Any], Any] | None = None,
    strategy: str = "auto",
    chunk: int | None = None,
    fast_conv: bool | str = "auto",
    sharding: Placement = None,
) -> H:
    """Makes a handler of many models out of the handler of one; its plans go into the same cache.

    It has the type and the methods of the handler it is made of. Parameters, carries and states
    lead with the member axis `[E, ...]`, but for the `order_key` of a state, which is shared;
    `trainer.init(params, key=key)` takes stacked parameters and one key, from which member i's is
    `fold_in(key, i)`, or keys `[E]`. Member i is what a single model with its key would be on the
    same rows, to rounding: losses, optimiser and random numbers of one never touch another's.

    Args:
        handler: What `jh.calculator`, `jh.validator`, `jh.trainer` or `jh.handler` gave.
        members: How many models, `E`.
        member_data: Whether rows are `[N, E, ...]`, each member's own, rather than shared.
        member_order: Whether members go over shared rows in orders of their own: True or "shuffle"
            permutes the rows of a macrobatch for each, "bootstrap" draws them with replacement, the
            same ones in every epoch; both need `shuffle="rows"` (on the device also "global").
            Member i's order is that of a model with the order key `fold_in(order_key, i)`, so it
            belongs to the place and stays there when members move.
        reduce: What becomes of outputs of rows before they leave the device: None keeps
            `[E, N, ...]`; "mean_std" gives `{"mean", "std"}`, "vote" the class most members vote
            for; or a function from leaves `[E, B, ...]` to leaves `[B, ...]`.
        strategy: "vmap" computes all members at once, "map" one after another. With "groups" a few
            members at a time go over a macrobatch before the next ones do, on as many threads as
            there are cores; on CPU with shared rows, and elsewhere it is "vmap". "auto" tries once
            and takes the fastest, or "vmap" where it may not try (`while_loop`s, and calls of the
            host). See `program.strategies.chosen`.
        chunk: Members at a time of a "map", or of a group.
        fast_conv: Whether `jh.fast_conv` rewrites convolutions, where that pays, and members that
            train by themselves take the products that a single one takes; "auto" does.
        sharding: Lays members over devices: `NamedSharding(mesh, PartitionSpec(axis))`, or the spec
            alone under `jax.set_mesh`. If they do not divide, some devices compute one twice.

    Returns:
        A handler of the same type. Outputs of rows are `[E, N, ...]`, metrics `[E]`, and the arrays
        of a `TrainInfo` `[E, S]`.

    Raises:
        TypeError: If `handler` is none, or an argument has the wrong type.
        ValueError: If an argument makes no sense, or `handler` is an ensemble already.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxhandler as jh
        >>> one = jh.trainer(lambda w, x: (w - x) ** 2, optax.sgd(0.25), batch_size=2)
        >>> many = jh.ensemble(one, members=3)
        >>> state = many.init(jnp.array([0.0, 1.0, 2.0]), key=jax.random.key(0))
        >>> state, info = many.train(state, jnp.ones(4))
        >>> state.params, info.losses.shape
        (Array([0.75, 1.  , 1.25], dtype=float32), (3, 2))
    """
    if not isinstance(handler, Handler):
        expected = "what jh.calculator, validator, trainer or handler gives"
        raise TypeError(explain("handler", seen=a_type(handler), expected=expected))
    program, members = handler.program, check_count("members", members)
    if program.members is not None:
        seen = f"an ensemble of {program.members}"
        fix = "Make it of the handler of one model; plans of both lie in that one's cache."
        raise ValueError(explain("handler", seen=seen, expected="one model", fix=fix))
    check_choice("member_order", member_order, tuple(_ORDERS))
    check_choice("fast_conv", fast_conv, ("auto", True, False))
    if member_data and member_order:
        fix = "Leave member_order out: rows that are a member's own need no order of their own."
        seen = "member_data=True as well"
        raise ValueError(explain("member_order", seen=seen, expected="shared rows", fix=fix))
    if member_order and isinstance(handler, Calculator | Validator):
        seen = f"{member_order!r} for {a_type(handler)}"
        expected = "False, since it never shuffles"
        raise ValueError(explain("member_order", seen=seen, expected=expected))
    reduce_fn = reduction(reduce)
    if reduce_fn is not None and program.outputs != "rows":
        fix = "Reduce the result instead: it is small."
        seen = f"a handler with outputs={program.outputs!r}"
        raise ValueError(explain("reduce", seen=seen, expected="outputs of rows", fix=fix))
    place = check_member_sharding(resolve_sharding(sharding))
    strategies = Strategies(strategy, chunk, ("vmap", "map", "groups"))
    names = "consts", "carry"
    if isinstance(handler, Calculator | Validator | Trainer):
        names = "params", "state"
    layout = MembersLayout(
        members=members,
        names=names,
        carry_axes=program.carry_axes,
        data_axis=1 if member_data or member_order else None,
        own_order=bool(member_order),
        place=place,
        reduce_fn=reduce_fn,
    )

    fast_products = bool(fast_conv) and program.fast_products

    def make_step(fn: Any, **options: Any) -> Step:
        forms = [
            rewritten(fn, members=many, trained=fast_products) if fast_conv else fn
            for many in (True, False)
        ]
        one, alone = (program.make_step(form, **options) for form in forms)
        # Here, so that trials know what a member by itself will take.
        alone = FastProducts(alone) if fast_products else alone
        return MembersStep(one, alone, layout, strategies)

    return program.build(
        program._replace(
            fast_conv=False,
            fast_products=fast_products,
            make_step=make_step,
            init=None if program.init is None else _init_of(program, members),
            row_axis=0 if reduce_fn else 1,
            members=members,
            member_order=_ORDERS[member_order],
            member_place=_placing(program, place),
            strategies=strategies,
        )
    )


def _init_of(program: Program, members: int) -> Callable[..., Any]:
    def init(params: Any, *, key: Any, model_state: Any = (), order_key: Any = None) -> Any:
        check_members("params", params, members)
        check_members("model_state", model_state, members)
        keys = as_key("key", key)
        if keys.shape not in ((), (members,)):
            seen, expected = f"keys {list(keys.shape)}", f"one key, or keys [{members}]"
            raise ValueError(explain("key", seen=seen, expected=expected))
        if order_key is None:
            order_key = default_order_key(keys.ravel()[0])
        if keys.shape == ():
            keys = jax.vmap(jax.random.fold_in, (None, 0))(keys, jnp.arange(members))

        def one(params: Any, key: Any, model_state: Any) -> Any:
            assert program.init is not None
            return program.init(params, key=key, model_state=model_state, order_key=order_key)

        # One compilation for all, and nothing of it is kept.
        return jax.jit(jax.vmap(one, out_axes=program.carry_axes))(params, keys, model_state)

    return init


def _placing(program: Program, place: NamedSharding | None) -> Callable[..., Any] | None:
    """Returns what lays consts and carry over devices, member by member."""
    if place is None:
        return None
    mesh, parts = place.mesh, place.mesh.shape[place.spec[0]]

    def lay(tree: Any, sharding: Any, put: Callable[[Any, Any], Any]) -> Any:
        tree = replicate_like(tree, place if sharding is None else sharding, put)
        leaves, structure = jax.tree.flatten(tree)
        axes = leaf_axes((0, program.carry_axes), tree)

        def put_members(leaf: Any, axis: int | None) -> Any:
            # What does not divide lies everywhere, and each device takes its part.
            split = axis is not None and leaf.ndim > axis and leaf.shape[axis] % parts == 0
            return put(leaf, place if split else NamedSharding(mesh, PartitionSpec()))

        return structure.unflatten(map(put_members, leaves, axes))

    return lay
