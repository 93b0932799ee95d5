"""What plans take over, and what stays the caller's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhandler.handlers.carries import spared
from jaxhandler.plans import compile_plan


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("committed", [False, True])
def test_what_a_plan_takes_over_is_not_the_callers(on_cpu: bool, committed: bool) -> None:
    carry = {"w": jnp.arange(10_000.0), "steps": jnp.int32(3), "same": jnp.ones(4, bool)}
    if committed:
        carry = jax.device_put(carry, jax.local_devices(backend="cpu")[-1])
    kept = jax.tree.map(np.array, carry)
    plan = compile_plan(
        lambda c: {"w": 2 * c["w"], "steps": c["steps"] + 1, "same": c["same"]},
        (spared(carry, on_cpu=on_cpu),),
        donate=(0,),
    )
    after = [plan(plan(spared(carry, on_cpu=on_cpu))) for _ in range(3)][-1]
    np.testing.assert_array_equal(after["w"], 4 * kept["w"])
    assert after["w"].devices() == carry["w"].devices()
    jax.tree.map(np.testing.assert_array_equal, carry, kept)
