"""Arrays that lie in memory in another order than they are written in, and who keeps that order."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

__all__ = [
    "AnyOrder",
    "InOrder",
    "Spread",
    "Turned",
    "as_written",
    "keeping_order",
    "turn",
    "windows_in",
]

# What is computed element by element. Others may be, too: they get arrays as they are written.
ELEMENTWISE = {
    primitives.abs_p, primitives.add_p, primitives.and_p, primitives.atan2_p, primitives.cbrt_p,
    primitives.ceil_p, primitives.clamp_p, primitives.convert_element_type_p, primitives.copy_p,
    primitives.cos_p, primitives.div_p, primitives.eq_p, primitives.erf_p, primitives.erfc_p,
    primitives.exp2_p, primitives.exp_p, primitives.expm1_p, primitives.floor_p, primitives.ge_p,
    primitives.gt_p, primitives.integer_pow_p, primitives.is_finite_p, primitives.le_p,
    primitives.log1p_p, primitives.log_p, primitives.logistic_p, primitives.lt_p,
    primitives.max_p, primitives.min_p, primitives.mul_p, primitives.ne_p, primitives.neg_p,
    primitives.not_p, primitives.or_p, primitives.pow_p, primitives.rem_p, primitives.round_p,
    primitives.rsqrt_p, primitives.select_n_p, primitives.sign_p, primitives.sin_p,
    primitives.sqrt_p, primitives.square_p, primitives.sub_p, primitives.tan_p,
    primitives.tanh_p, primitives.xor_p,
}  # fmt: skip
# What goes through windows, or adds up axes.
WINDOWED = {primitives.reduce_window_max_p, primitives.reduce_window_sum_p}
REDUCED = {primitives.reduce_max_p, primitives.reduce_min_p, primitives.reduce_sum_p}


class Turned(NamedTuple):
    """An array whose axes stand in another order.

    Attributes:
        array: The array, in that order.
        order: Which of the axes, as they are written, stands where.
    """

    array: jax.Array
    order: tuple[int, ...]


class Spread(NamedTuple):
    """An array that is repeated along axes, in whichever order it is asked for.

    In the order of what it is added to, so that its gradient is a sum in that order, too.

    Attributes:
        array: The array, as it is written.
        shape: The shape that it gets, as it is written.
        axes: Which of those axes are its own.
    """

    array: Any
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    def turned(self, order: tuple[int, ...]) -> jax.Array:
        """Returns it with its axes in an order."""
        places = [order.index(axis) for axis in self.axes]
        return lax.broadcast_in_dim(
            self.array.transpose(np.argsort(places)) if places else self.array,
            [self.shape[axis] for axis in order],
            sorted(places),
        )


class InOrder(NamedTuple):
    """A form whose first operand, and whose result, are turned.

    Attributes:
        form: A function of operands, the first one in `takes`, that gives its result in `gives`.
        takes: An order, for `Turned`.
        gives: Another one.
    """

    form: Callable[..., jax.Array]
    takes: tuple[int, ...]
    gives: tuple[int, ...]

    def __call__(self, *operands: Any) -> Turned:
        first, *rest = operands
        result = self.form(turn(first, self.takes), *map(as_written, rest))
        return Turned(result, self.gives)


class AnyOrder(NamedTuple):
    """A form whose result has the order of its operand.

    Attributes:
        make: `make(order)` gives the form for an array in an order; None is for one that no other
            form has made.
    """

    make: Callable[[tuple[int, ...] | None], Callable[[Any], jax.Array]]

    def __call__(self, operand: Any) -> Any:
        if isinstance(operand, Turned):
            return Turned(self.make(operand.order)(operand.array), operand.order)
        return self.make(None)(as_written(operand))


def as_written(value: Any) -> Any:
    """Returns an array with its axes as they are written, whether it was turned or not."""
    if isinstance(value, Spread):
        return value.turned(tuple(range(len(value.shape))))
    if not isinstance(value, Turned):
        return value
    return value.array.transpose(np.argsort(value.order))


def turn(value: Any, order: tuple[int, ...]) -> Any:
    """Returns an array with its axes in an order; one without axes as it is.

    Args:
        value: An array, turned or not.
        order: For `Turned`.

    Example:
        >>> import jax.numpy as jnp
        >>> turn(jnp.zeros((2, 3)), (1, 0)).shape
        (3, 2)
    """
    if isinstance(value, Turned) and value.order == order:
        return value.array
    if isinstance(value, Spread):
        return value.turned(order)
    value = as_written(value)
    return value.transpose(order) if np.ndim(value) else value


def windows_in(order: tuple[int, ...], eqn: Any) -> Callable[..., jax.Array]:
    """Returns what an equation of windows does by itself, for arrays in an order."""
    params = {
        name: tuple(value[axis] for axis in order) if isinstance(value, tuple) else value
        for name, value in eqn.params.items()
    }
    return lambda *arrays: eqn.primitive.bind(*arrays, **params)


def keeping_order(
    eqn: Any,
    operands: Sequence[Any],
    evaluate: Callable[[core.ClosedJaxpr, Sequence[Any]], list[Any]],
) -> list[Any] | None:
    """Computes an equation in the order of its operands, if that changes nothing but the order.

    Args:
        eqn: The equation.
        operands: Its operands, some of them turned.
        evaluate: What a jaxpr gives for operands that may be turned.

    Returns:
        Its results, turned unless they are sums or the like; None where it must be computed as it
        is written.
    """
    if eqn.primitive is primitives.jit_p:
        return evaluate(eqn.params["jaxpr"], operands)
    [order, *others] = {each.order for each in operands if isinstance(each, Turned)}
    ranks = {len(atom.aval.shape) for atom in eqn.invars}
    placed = eqn.params.get("sharding") or eqn.params.get("out_sharding")
    if others or placed is not None or not ranks <= {0, len(order)}:
        return None
    if eqn.primitive is primitives.custom_jvp_call_p:
        return _with_rule(eqn, operands, order, evaluate)
    arrays = [turn(each, order) for each in operands]
    if eqn.primitive in ELEMENTWISE:
        return [Turned(eqn.primitive.bind(*arrays, **eqn.params), order)]
    if eqn.primitive in WINDOWED:
        return [Turned(windows_in(order, eqn)(*arrays), order)]
    if eqn.primitive in REDUCED:
        axes = tuple(order.index(axis) for axis in eqn.params["axes"])
        result = eqn.primitive.bind(*arrays, **{**eqn.params, "axes": axes})
        left = [axis for axis in order if axis not in eqn.params["axes"]]
        return [result.transpose(np.argsort(left))]
    return None


def _with_rule(
    eqn: Any,
    operands: Sequence[Any],
    order: tuple[int, ...],
    evaluate: Callable[[core.ClosedJaxpr, Sequence[Any]], list[Any]],
) -> list[Any] | None:
    """A function with a derivative rule of its own, which is traced as it is written."""
    avals = [atom.aval for atom in (*eqn.invars, *eqn.outvars)]
    real = all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in avals)
    if not real or len(eqn.outvars) != 1 or len(avals[-1].shape) != len(order):
        return None
    if eqn.params["symbolic_zeros"]:
        return None  # The rule asks which tangents there are.
    avals = avals[:-1]

    def as_is(*operands: jax.Array) -> jax.Array:
        return eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))[0]

    def moved(*both: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(as_is, both[: len(avals)], both[len(avals) :])

    def turned(jaxpr: core.ClosedJaxpr, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        results = evaluate(jaxpr, [Turned(x, order) if x.ndim else x for x in arrays])
        return [turn(each, order) for each in results]

    def rule(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        value, tangent = turned(jax.make_jaxpr(moved)(*avals, *avals), (*primals, *tangents))
        return value, tangent

    fn = jax.custom_jvp(lambda *arrays: turned(eqn.params["call_jaxpr"], arrays)[0])
    fn.defjvp(rule)
    return [Turned(fn(*(jnp.asarray(turn(each, order)) for each in operands)), order)]
