"""The versions on which artifacts and stored plans depend."""

import importlib.metadata

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Returns the versions of jax, jaxlib and jaxhandler; of what is not installed, none.

    Example:
        >>> sorted(versions())
        ['jax', ...]
    """
    found = {}
    for package in ("jax", "jaxlib", "jaxhandler"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
