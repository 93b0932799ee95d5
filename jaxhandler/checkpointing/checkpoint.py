"""The description of a checkpoint, and its state read back outside a run."""

import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxhandler.checkpointing.commits import commits_in
from jaxhandler.checkpointing.identity import FIELDS
from jaxhandler.checkpointing.leaves import nested
from jaxhandler.errors import a_type, check_choice, check_count, explain

__all__ = ["STATE", "Checkpoint", "check_checkpoint", "checkpoint", "load_state"]

STATE = "state"
"""The name under which a commit holds the carry of a run."""
_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}
_SAME, _IGNORE = "require-same", "ignore:"


class Checkpoint(NamedTuple):
    """Where, how often and how strictly a run is kept; made by `jh.checkpoint`.

    Attributes:
        directory: The folder of its commits.
        every: Seconds between two commits.
        keep: How many of them stay.
        ignored: The fields of a run's identity that may differ where it goes on.
        fingerprint: How much of data, parameters and state their digests cover.

    Example:
        >>> checkpoint("run", every="5min").every
        300.0
    """

    directory: Path
    every: float
    keep: int
    ignored: tuple[str, ...]
    fingerprint: str


def checkpoint(
    directory: str | os.PathLike[str],
    *,
    every: float | str = "30s",
    keep: int = 2,
    resume: str = "require-same",
    fingerprint: str = "auto",
) -> Checkpoint:
    """Describes how a run is kept, so that it goes on after it was stopped, whatever stopped it.

    Passed as `checkpoint=` to a run. Where the folder holds commits, the run goes on from the
    newest intact one and ends with the very bits of one that was never stopped; a call that was
    completed returns its result without work. Otherwise the run begins.

    State, order and results so far are committed between macrobatches, in a thread of its own, and
    once more when SIGTERM, Ctrl-C or what a callback raises ends the run. A commit is whole or
    absent whenever the process dies. Losing power is another matter: disks may lie.

    Args:
        directory: A folder for this one run; made if there is none. Each call needs its own.
        every: Seconds between two commits, or text such as "0.2s", "30s", "5min"; 0 commits after
            every macrobatch and waits for the disk each time.
        keep: Commits that stay, at least 2: if the newest is damaged, the run warns and goes on
            from the one before.
        resume: What a run that goes on must have in common with the one that was stopped:
            "require-same" everything (data, batch and macrobatch size, shuffle, keys, trees,
            versions), "ignore:epochs" or "ignore:batch_size,versions" all but what is named.
        fingerprint: How much of the data, of parameters and of the state their SHA-256 cover:
            "full" all, "sampled" 64 MiB of each, "auto" all up to 1 GB and 64 MiB above. They are
            read once where a run begins.

    Returns:
        A `Checkpoint`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a value that makes no sense.

    Example:
        >>> import jax, numpy as np, optax, jaxhandler as jh
        >>> tr = jh.trainer(lambda w, x: (w - x) ** 2, optax.sgd(0.25), batch_size=2)
        >>> state, data = tr.init(np.float32(0), key=jax.random.key(0)), np.ones(4, np.float32)
        >>> once, info = tr.train_from_host(state, data, checkpoint=jh.checkpoint("run"))
        >>> again, info = tr.train_from_host(state, data, checkpoint=jh.checkpoint("run"))
        >>> bool(once.params == again.params), info.losses, info.report.rows
        (True, array([1.  , 0.25]), 0)
    """
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(explain("directory", seen=a_type(directory), expected="a path"))
    if Path(directory).exists() and not Path(directory).is_dir():
        seen, expected = f"{str(directory)!r}, a file", "a folder, or a path where nothing lies"
        raise ValueError(explain("directory", seen=seen, expected=expected))
    if check_count("keep", keep) < 2:
        fix = "While one is written, or if it is damaged, the other must be there."
        raise ValueError(explain("keep", seen=str(keep), expected="at least 2", fix=fix))
    check_choice("fingerprint", fingerprint, ("auto", "full", "sampled"))
    return Checkpoint(Path(directory), _seconds(every), keep, _ignored(resume), fingerprint)


def check_checkpoint(checkpoint: Any) -> None:
    """Refuses what is no checkpoint, or cannot be kept.

    Args:
        checkpoint: As given.

    Raises:
        TypeError: If it is something else.
        ValueError: If there are several processes.
    """
    if not isinstance(checkpoint, Checkpoint):
        seen, expected = a_type(checkpoint), "what jh.checkpoint(...) gives"
        raise TypeError(explain("checkpoint", seen=seen, expected=expected))
    if jax.process_count() > 1:
        seen, fix = f"{jax.process_count()} processes", "Save the state at the end of each call."
        raise ValueError(explain("checkpoint", seen=seen, expected="one process", fix=fix))


def load_state(directory: str | os.PathLike[str], like: Any = None) -> Any:
    """Reads the state of the newest intact commit, outside a run.

    Args:
        directory: The folder that was given to `jh.checkpoint`.
        like: A tree of exactly the structure, classes of nodes included, shapes and dtypes that
            were saved, what `trainer.init` gives for instance, or its `jax.eval_shape`; None for
            none.

    Returns:
        The state in the tree `like`, NamedTuples of optimisers and random keys included; without
        `like` nested dictionaries of NumPy arrays by the names of fields.

    Raises:
        FileNotFoundError: If there is no commit.
        TypeError: If `directory` is no path.
        ValueError: If the tree differs, which names each leaf and each node that does, if a leaf
            has 64 bits, is no NumPy array in `like`, and `jax_enable_x64` is not set, or if no
            commit is intact.

    Example:
        >>> import jax, numpy as np, optax, jaxhandler as jh
        >>> tr = jh.trainer(lambda w, x: (w - x) ** 2, optax.sgd(0.25), batch_size=2)
        >>> state, data = tr.init(np.float32(0), key=jax.random.key(0)), np.ones(4, np.float32)
        >>> _ = tr.train_from_host(state, data, checkpoint=jh.checkpoint("run"))
        >>> jh.load_state("run")["params"]
        array(0.75, dtype=float32)
        >>> int(jh.load_state("run", like=state).step)
        2
    """
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(explain("directory", seen=a_type(directory), expected="a path"))
    commit = next(commits_in(Path(directory)), None)
    if commit is None:
        seen, expected = "no commit", "what a run with checkpoint=jh.checkpoint(...) leaves"
        raise FileNotFoundError(explain(str(directory), seen=seen, expected=expected))
    if like is None:
        return nested(commit.entries[STATE], commit.arrays)
    return commit.restore(STATE, like)


def _seconds(every: float | str) -> float:
    seconds = math.nan
    if isinstance(every, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|min|h)\s*", every)
        if match is not None:
            seconds = float(match[1]) * _UNITS[match[2]]
    elif isinstance(every, bool) or not isinstance(every, int | float):
        expected = 'seconds, or text such as "30s"'
        raise TypeError(explain("every", seen=a_type(every), expected=expected))
    else:
        seconds = float(every)
    if not 0 <= seconds < math.inf:
        expected = 'seconds of at least 0, or text such as "0.2s", "30s", "5min", "1h"'
        raise ValueError(explain("every", seen=repr(every), expected=expected))
    return seconds


def _ignored(resume: str) -> tuple[str, ...]:
    if not isinstance(resume, str):
        raise TypeError(explain("resume", seen=a_type(resume), expected="text"))
    if resume == _SAME:
        return ()
    names = tuple(name.strip() for name in resume.removeprefix(_IGNORE).split(","))
    if not resume.startswith(_IGNORE) or not set(names) <= set(FIELDS):
        expected = f'"{_SAME}", or "{_IGNORE}" and some of {", ".join(FIELDS)}'
        raise ValueError(explain("resume", seen=repr(resume), expected=expected))
    return names
