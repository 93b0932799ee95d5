"""Inferers from artifacts: `jh.load_inferer`."""

import os
from collections.abc import Iterable

from jaxhandler.errors import check_choice
from jaxhandler.inference import artifact, store
from jaxhandler.inference.inferer import MemoizingInferer
from jaxhandler.inference.memoizing import memoizing_inferer
from jaxhandler.inference.policies import Policy

__all__ = ["load_inferer"]


def load_inferer(
    directory: str | os.PathLike[str],
    *,
    preload: Iterable[int] | str = (),
    policy: Policy | None = None,
    max_plans: int | None = None,
    background: bool | None = None,
    freeze: bool | None = None,
    narrowing: str = "warn",
) -> MemoizingInferer:
    """Loads what `infer.save` wrote; the model's code is not needed.

    Every file is compared with the SHA-256 in the manifest before the first is made sense of, and
    nothing of the artifact is executed but the model's StableHLO, compiled by XLA. Whoever can
    write to the artifact decides what the model computes, so it deserves the trust of a program.

    `infer.apply_fn` is the exported model: for `jit` and handlers, for any number of rows, without
    derivatives and without `vmap`. Containers other than dicts, lists, tuples and None have become
    dicts of their fields, in parameters, inputs and outputs alike; random keys among the parameters
    have become their numbers. With `jh.enable_plan_store`, plans that this machine compiled before
    are not compiled again.

    Args:
        directory: The artifact.
        preload: Numbers of rows whose plans are made now; "observed" are those of the requests that
            the saved inferer had seen.
        policy: Which buckets there are; None is the policy saved.
        max_plans: The most plans to hold; None is as saved.
        background: As in `jh.memoizing_inferer`; None is as saved.
        freeze: As in `jh.memoizing_inferer`; None is as saved.
        narrowing: As in `jh.memoizing_inferer`.

    Returns:
        A `MemoizingInferer`.

    Raises:
        FileNotFoundError: If the folder or one of its files is not there; names it.
        ImportError: If flatbuffers is not installed; names the extra.
        TypeError: If an argument has the wrong type, or a leaf 64 bits while `jax_enable_x64` is
            not set.
        ValueError: If the artifact is damaged (names the file), foreign or newer, or was not
            exported for this platform; if an argument makes no sense.

    Example:
        >>> import numpy as np, jaxhandler as jh
        >>> example = np.zeros((1, 3), np.float32)
        >>> infer = jh.memoizing_inferer(lambda params, x: x @ params["w"],
        ...     {"w": np.ones((3, 2), np.float32)}, example, policy=jh.policies.powers_of_two(64))
        >>> infer.save("model")
        >>> jh.load_inferer("model")(np.ones((5, 3), np.float32)).shape
        (5, 2)
    """
    if isinstance(preload, str):
        check_choice("preload", preload, ("observed",))
    found = artifact.load(directory)
    settings = found.settings
    frozen = settings["freeze"] if freeze is None else freeze
    infer = memoizing_inferer(
        found.apply_fn,
        found.params,
        found.example,
        policy=found.policy if policy is None else policy,
        max_plans=settings["max_plans"] if max_plans is None else max_plans,
        background=settings["background"] if background is None else background,
        freeze=frozen,
        row_axis=found.row_axis,
        narrowing=narrowing,
    )
    identity = (found.digest, found.params_digest if frozen else None)
    infer.engine.compile_fn = store.compile_fn(identity)
    if isinstance(preload, str):
        preload = _most_seen(infer, {int(size): n for size, n in settings["sizes"].items()})
    infer.preload(preload)
    return infer


def _most_seen(infer: MemoizingInferer, seen: dict[int, int]) -> list[int]:
    """The sizes that were asked for most, as many as there may be plans for."""
    most, wanted, chosen = infer.engine.plans.max_plans, set[int](), []
    for size in sorted(seen.keys() - {0}, key=seen.__getitem__, reverse=True):
        more = wanted | {part.bucket for part in infer.policy.parts(size)}
        if most is None or len(more) <= most:
            wanted = more
            chosen.append(size)
    return chosen
