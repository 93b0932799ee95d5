"""The versions on which artifacts, stored plans and checkpoints depend."""

import importlib.metadata

__all__ = ["versions"]


def versions(*more: str) -> dict[str, str]:
    """Returns the versions of jax, jaxlib and jaxhandler; of what is not installed, none.

    Args:
        *more: Further packages.

    Returns:
        Versions by package.

    Example:
        >>> sorted(versions("optax"))
        ['jax', ..., 'optax']
    """
    found = {}
    for package in ("jax", "jaxlib", "jaxhandler", *more):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
