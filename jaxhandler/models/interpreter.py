"""Evaluates a jaxpr with other forms of some of its equations, through the jaxprs inside it."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend import core
from jax.extend.core import primitives

from jaxhandler.models.convolutions import convolution_form, single_form, trained_form
from jaxhandler.models.forms import Form
from jaxhandler.models.orders import (
    AnyOrder,
    InOrder,
    Spread,
    Turned,
    as_written,
    keeping_order,
)
from jaxhandler.models.pooling import (
    max_pool_form,
    single_pool_form,
    sum_pool_form,
    sum_slices,
    trained_pool_form,
)
from jaxhandler.models.products import product_form

__all__ = ["FORMS", "PRODUCTS", "SINGLE_FORMS", "TRAINED_FORMS", "Rewriter"]

Forms = Mapping[core.Primitive, Callable[[Any], Form | None]]

# What is put in the place of an equation, by its primitive.
FORMS: Forms = {
    primitives.conv_general_dilated_p: convolution_form,
    primitives.reduce_window_max_p: max_pool_form,
    primitives.reduce_window_sum_p: sum_pool_form,
}
# The same for one model, which is not batched over its parameters.
SINGLE_FORMS: Forms = {
    primitives.conv_general_dilated_p: single_form,
    primitives.reduce_window_max_p: single_pool_form(max_pool_form, max_pool_form),
    primitives.reduce_window_sum_p: single_pool_form(sum_pool_form, sum_slices),
}
# Of one model that is differentiated wherever it is called.
TRAINED_FORMS: Forms = {
    primitives.conv_general_dilated_p: trained_form,
    primitives.reduce_window_max_p: trained_pool_form(max_pool_form),
    primitives.reduce_window_sum_p: trained_pool_form(sum_pool_form),
}
# And for what contains gradients already.
PRODUCTS: Forms = {primitives.dot_general_p: product_form}
# Primitives that stay what they are when their functions are replaced. A function with a derivative
# rule of its own keeps the rule.
ENTERED = {
    primitives.jit_p,
    primitives.closed_call_p,
    primitives.remat_p,
    primitives.scan_p,
    primitives.while_p,
    primitives.cond_p,
    primitives.custom_jvp_call_p,
    primitives.custom_vjp_call_p,
}


class Rewriter:
    """Evaluates jaxprs with other forms in them; a jaxpr that occurs twice is rewritten once.

    Those of `jit` are evaluated in their place, each time, where an operand of theirs is turned.
    """

    def __init__(self, forms: Forms) -> None:
        self._forms = forms
        # Each with its owner, without which another could get the same number.
        self._changes: dict[int, tuple[core.Jaxpr, bool]] = {}
        self._rewritten: dict[int, tuple[Any, core.ClosedJaxpr]] = {}

    def changes(self, jaxpr: core.Jaxpr) -> bool:
        """Whether anything in a jaxpr has another form."""
        if id(jaxpr) not in self._changes:
            self._changes[id(jaxpr)] = jaxpr, any(map(self._changes_eqn, jaxpr.eqns))
        return self._changes[id(jaxpr)][1]

    def _changes_eqn(self, eqn: Any) -> bool:
        if eqn.primitive in ENTERED:
            return any(map(self._changes_inside, core.jaxprs_in_params(eqn.params)))
        return self._form(eqn) is not None

    def _changes_inside(self, jaxpr: core.Jaxpr) -> bool:
        # References, as of `jax.new_ref`, cannot be arguments of a trace of ours.
        arrays = all(isinstance(each.aval, ShapedArray) for each in jaxpr.invars)
        return arrays and self.changes(jaxpr)

    def evaluate(self, jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """What a jaxpr gives for its arguments."""
        closed = core.ClosedJaxpr(jaxpr, list(consts))
        return [as_written(each) for each in self._evaluate(closed, args)]

    def _evaluate(self, closed: core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
        """The same for arguments and results that may be turned."""
        jaxpr, consts = closed.jaxpr, closed.consts
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            # Profiles call it what the user does.
            name = str(eqn.source_info.name_stack)
            with eqn.ctx.manager, jax.named_scope(name) if name else contextlib.nullcontext():
                values.update(zip(eqn.outvars, self._results(eqn, operands), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _results(self, eqn: Any, operands: list[Any]) -> list[Any]:
        form, params = self._form(eqn), eqn.params
        repeats = eqn.primitive is primitives.broadcast_in_dim_p and len(operands) == 1
        if repeats and params["sharding"] is None:
            array = as_written(operands[0])
            return [Spread(array, params["shape"], params["broadcast_dimensions"])]
        if form is None and any(isinstance(each, Turned) for each in operands):
            kept = keeping_order(eqn, operands, self._evaluate)
            if kept is not None:
                return kept
        if isinstance(form, AnyOrder | InOrder):
            return [form(*operands)]
        operands = [as_written(each) for each in operands]
        results = form(*operands) if form else self._bind(eqn, operands)
        return list(results) if eqn.primitive.multiple_results else [results]

    def _bind(self, eqn: Any, operands: list[Any]) -> Any:
        params = eqn.params
        if eqn.primitive in ENTERED and self._changes_eqn(eqn):
            params = {name: self._rewrite_in(param) for name, param in params.items()}
        return eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(params))

    def _rewrite_in(self, param: Any) -> Any:
        """A parameter of an equation, with the jaxprs in it rewritten."""
        if isinstance(param, tuple | list):
            return type(param)(map(self._rewrite_in, param))
        if isinstance(param, core.ClosedJaxpr) and self._changes_inside(param.jaxpr):
            return self._rewrite(param, param.jaxpr, param.consts)
        if isinstance(param, core.Jaxpr) and self._changes_inside(param):
            return self._rewrite(param, param, ()).jaxpr
        return param

    def _rewrite(self, owner: Any, jaxpr: core.Jaxpr, consts: Sequence[Any]) -> core.ClosedJaxpr:
        if id(owner) not in self._rewritten:
            avals = [each.aval for each in jaxpr.invars]
            trace = jax.make_jaxpr(lambda *args: self.evaluate(jaxpr, consts, args))
            self._rewritten[id(owner)] = owner, trace(*avals)
        return self._rewritten[id(owner)][1]

    def _form(self, eqn: Any) -> Form | None:
        find = self._forms.get(eqn.primitive)
        return None if find is None or _is_more_than_arrays(eqn) else find(eqn)


def _is_more_than_arrays(eqn: Any) -> bool:
    """Whether types say what forms do not keep: that it is weak, or how an array is sharded."""
    # A batch axis of `vmap` is sharded without a word of it in the types.
    if jax.sharding.AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        return True
    arrays = *eqn.invars, *eqn.outvars
    weak = any(array.aval.weak_type for array in eqn.outvars)
    return weak or any(any(array.aval.sharding.spec) for array in arrays)
