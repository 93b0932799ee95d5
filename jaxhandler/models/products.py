"""Which products of matrices get another form: sums over rows for few columns, as gradients are."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxhandler.models.forms import Form, native

__all__ = ["pays", "product_form"]

# How narrow a result must be at most, whatever its other side is; and against that side.
MOST_NARROW = 32
LEAST_WIDE_TO_NARROW = 6
# A wide side from which on XLA loses its cache, and wider results pay, by how many rows there are.
VERY_WIDE = 1024
MOST_NARROW_OF_VERY_WIDE = 128
ROWS_TO_NARROW = 4


def product_form(eqn: Any) -> Form | None:
    """Returns what to put in the place of one `dot_general`, or None to leave it.

    `x.T @ g` of `x` `[B, D]` and `g` `[B, C]` is the gradient of a dense layer's weights. XLA is
    slow on CPU where `C` is small: it reads `x` column by column. `(g.T @ x).T` reads rows, if
    `g.T` lies in memory as it is written; a row of zeros below it keeps XLA from undoing that.

    Args:
        eqn: The equation. Only sums over all leading axes of both operands are changed.

    Returns:
        A function of the equation's operands, or None where it cannot pay for any number of rows:
        whether anything changes must not depend on it, since a run has plans of several.
    """
    contracted, batched = eqn.params["dimension_numbers"]
    lhs, rhs = (operand.aval for operand in eqn.invars)
    types = {array.aval.dtype.name for array in (*eqn.invars, *eqn.outvars)}
    leading = tuple(range(len(contracted[0])))
    if types not in ({"float32"}, {"float64"}) or any(map(len, batched)):
        return None
    if any(tuple(axes) != leading for axes in contracted) or not leading:
        return None
    if {lhs.ndim, rhs.ndim} != {len(leading) + 1} or eqn.params["out_sharding"] is not None:
        return None
    if jax.default_backend() != "cpu":
        return None
    narrow, wide = sorted((lhs.shape[-1], rhs.shape[-1]))
    if not 2 <= narrow <= min(wide // LEAST_WIDE_TO_NARROW, MOST_NARROW_OF_VERY_WIDE):
        return None
    if not pays(math.prod(lhs.shape[:-1]), narrow, wide):
        return native(eqn)

    def of_rows(few: jax.Array, many: jax.Array) -> jax.Array:
        transposed = few.reshape(-1, narrow).T
        result = lax.dot(
            lax.pad(transposed, jnp.zeros((), few.dtype), ((0, 1, 0), (0, 0, 0))),
            many.reshape(-1, wide),
            precision=eqn.params["precision"],
            preferred_element_type=eqn.params["preferred_element_type"],
        )
        return result[:narrow]

    def form(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return of_rows(lhs, rhs) if lhs.shape[-1] == narrow else of_rows(rhs, lhs).T

    return form


def pays(rows: int, narrow: int, wide: int) -> bool:
    """Whether the other form of a sum over rows is faster.

    Measured on one and two cores, 8 to 4,096 rows, results of 2 to 256 times 8 to 4,096, in float32
    and float64: what is taken took 0.1 to 1.0 of the native time, mostly below 0.6, and once 1.4
    (32 times 1,024, of 16 rows). Of what is left, some lost up to 2.7 times; some would have won,
    results of 40 to 64 times 400 to 1,000 up to 2.6 times.

    Args:
        rows: Rows that are added up.
        narrow: The smaller side of the result.
        wide: The larger side.

    Example:
        >>> pays(rows=128, narrow=10, wide=784), pays(rows=128, narrow=256, wide=784)
        (True, False)
    """
    most = MOST_NARROW
    if wide >= VERY_WIDE:
        most = max(most, min(rows // ROWS_TO_NARROW, MOST_NARROW_OF_VERY_WIDE))
    return 2 <= narrow <= min(most, wide // LEAST_WIDE_TO_NARROW, 2 * rows)
