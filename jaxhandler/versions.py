"""Versions, settings and the processor on which artifacts, stored plans and checkpoints depend."""

import importlib.metadata
import platform
from pathlib import Path

import jax

__all__ = ["processor", "settings", "versions"]


def processor() -> list[str]:
    """Returns what tells this processor, and so the instructions that XLA uses, from others.

    Returns:
        Where Linux tells, the lines of `/proc/cpuinfo` that name it and its instructions.

    Example:
        >>> processor() == processor()
        True
    """
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return [platform.machine(), platform.processor()]
    names = ("model name", "flags", "Features", "CPU part")
    lines = info.read_text(errors="replace").splitlines()
    return sorted({line for line in lines if line.startswith(names)})


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


def settings() -> dict[str, str]:
    """Returns the settings of JAX on which it depends what a random key draws, by name.

    Example:
        >>> settings()
        {'jax_threefry_partitionable': 'True'}
    """
    name = "jax_threefry_partitionable"
    return {name: str(getattr(jax.config, name))}
