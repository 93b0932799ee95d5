"""Functions and steps that compute the same in forms that are fast: `jh.fast_conv` and others."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.errors import a_type, explain
from jaxhandler.typing import Batch, Step

__all__ = ["FastProducts", "fast_conv", "rewritten"]


def fast_conv(fn: Callable[..., Any], *, members: bool = True) -> Callable[..., Any]:
    """Returns `fn` with its convolutions and pools in the forms that are fast, over members or not.

    Each convolution becomes a matrix product, of patches of the input and a banded matrix of the
    kernel, and each max-pool a chain of strided slices. On CPU that trains ten LeNet-5 under `vmap`
    about three times as fast, and compiles no slower. Values, and derivatives of any order, are the
    native ones but for rounding, and where an input is NaN or infinite: that reaches up to a tile
    of outputs around its window. A max-pool's gradient goes to the first of equals, as natively;
    there, XLA's forward and second derivatives do not agree with its gradient, and these do.

    One model gains as well, with `members=False`: its convolutions of few channels become products
    or sums of shifted images, the others stay; pools become slices, and what follows a convolution
    of channels first has them last. On one core of a CPU, jitted, 1 to 256 rows, a LeNet-5 answers
    in 0.35 to 0.55 of the native time, two layers of 16 and 32 channels in 0.3 to 0.65, of 32 and
    64 in 0.65 to 1 over RGB and in 0.9 to 1 over one channel; with channels first, these two in 0.3
    to 0.7. They train in 0.3 to 0.5, 32 rows a step.

    Apply it to the model or the loss, before it is differentiated, batched or jitted: a gradient
    inside `fn` has convolutions of its own, and some of them stay. A step over members may need up
    to five times the memory, and many members are faster still in a `jax.lax.map` with a
    `batch_size` of about ten. What would not pay stays, and where there is nothing to do, `fn`
    itself is called.

    `fn` is traced whenever it is called, so jit what is made of it. Convolutions are found inside
    `jit`, `jax.checkpoint`, `scan`, `while_loop` and `cond` as well. A function with a derivative
    rule of its own keeps the rule as it is; nothing is changed inside `shard_map`, functions with a
    batching rule of their own, and kernels.

    Args:
        fn: A pure function of pytrees, positional or by keyword. Leaves other than arrays reach it
            as they are.
        members: Whether `fn` is then batched over the parameters of members. False is for one model
            that is served or trained: over members it is right too, but slower. It changes nothing
            on other backends than CPU, where only windows of one change over members.

    Returns:
        A function that is called like `fn`. What cannot be traced is called as it is.

    Raises:
        TypeError: If `fn` is no function.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxhandler as jh
        >>> def apply_fn(kernel, images):
        ...     return jax.lax.conv(images, kernel, (1, 1), "SAME")
        >>> kernels, images = jnp.ones((10, 4, 1, 3, 3)), jnp.ones((32, 1, 8, 8))
        >>> members = jax.jit(jax.vmap(jh.fast_conv(apply_fn), in_axes=(0, None)))
        >>> members(kernels, images).shape
        (10, 32, 4, 8, 8)
        >>> "convolution" in members.lower(kernels, images).as_text()
        False
    """
    if not callable(fn):
        raise TypeError(explain("fn", seen=a_type(fn), expected="a function"))

    @functools.wraps(fn)
    def fast(*args: Any, **kwargs: Any) -> Any:
        # It needs jax.extend, which takes long to import.
        from jaxhandler.models.interpreter import FORMS, SINGLE_FORMS

        return _evaluate(fn, FORMS if members else SINGLE_FORMS, args, kwargs)

    return fast


def _trained(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def fast(*args: Any, **kwargs: Any) -> Any:
        from jaxhandler.models.interpreter import TRAINED_FORMS

        return _evaluate(fn, TRAINED_FORMS, args, kwargs)

    return fast


def rewritten(fn: Any, *, members: bool, trained: bool = False) -> Any:
    """Returns what `fast_conv` makes of a function, or of each one in a dictionary.

    Args:
        fn: A function, or functions by name.
        members: As in `fast_conv`.
        trained: Whether a function of one model is differentiated wherever it is called.

    Example:
        >>> list(rewritten({"loss": jnp.sin}, members=False))
        ['loss']
    """
    fast = _trained if trained and not members else functools.partial(fast_conv, members=members)
    return {name: fast(each) for name, each in fn.items()} if isinstance(fn, Mapping) else fast(fn)


@dataclass(frozen=True)
class FastProducts:
    """A step with its sums over rows of few columns as they are fast where one model runs on a CPU.

    Attributes:
        step: The step, gradients and all. Two of the same step are equal.

    Example:
        >>> double = FastProducts(lambda consts, carry, batch: (carry, 2 * batch))
        >>> double((), (), jnp.ones(2))
        ((), Array([2., 2.], dtype=float32))
    """

    step: Step

    def __call__(self, consts: Any, carry: Any, batch: Batch, /) -> tuple[Any, Any]:
        from jaxhandler.models.interpreter import PRODUCTS

        return _evaluate(self.step, PRODUCTS, (consts, carry, batch), {})

    @staticmethod
    def changes(jaxpr: Any) -> bool:
        """Returns whether there is anything in the jaxpr of a step that is faster.

        Args:
            jaxpr: A `jax.core.ClosedJaxpr`.
        """
        if jax.default_backend() != "cpu":
            return False
        from jaxhandler.models.interpreter import PRODUCTS, Rewriter

        return Rewriter(PRODUCTS).changes(jaxpr.jaxpr)


def _evaluate(fn: Callable[..., Any], forms: Any, args: Any, kwargs: Any) -> Any:
    """What a function gives, computed with other forms where there are any."""
    from jaxhandler.models.interpreter import Rewriter

    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = [leaf for leaf in leaves if _is_array(leaf)]

    def of_arrays(*arrays: Any) -> Any:
        given = iter(arrays)
        inner = [next(given) if _is_array(leaf) else leaf for leaf in leaves]
        args, kwargs = tree.unflatten(inner)
        return fn(*args, **kwargs)

    try:
        traced = jax.make_jaxpr(of_arrays, return_shape=True)(*arrays)
    except Exception:  # Whatever it is, the function itself says it best.
        traced = None
    rewriter = Rewriter(forms)
    if traced is None or not rewriter.changes(traced[0].jaxpr):
        return fn(*args, **kwargs)
    closed, shapes = traced
    outputs = rewriter.evaluate(closed.jaxpr, closed.consts, arrays)
    # What depends on no argument comes as a literal.
    return jax.tree.structure(shapes).unflatten(map(jnp.asarray, outputs))


def _is_array(leaf: object) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)
