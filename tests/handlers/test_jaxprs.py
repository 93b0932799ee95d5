"""What the jaxpr of a step tells."""

import subprocess
import sys
from pathlib import Path


def test_a_digest_is_the_same_in_every_process() -> None:
    script = """
import jax, jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxhandler.handlers.jaxprs import digest_jaxpr
policy = jax.checkpoint_policies.save_only_these_names("a", "b", "c", "d")
step = jax.checkpoint(lambda x: checkpoint_name(jnp.sin(x), "a") * 2, policy=policy)
print(digest_jaxpr(jax.make_jaxpr(jax.grad(step))(1.0)))
"""
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parents[2],
            env={"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(digests) == 1
