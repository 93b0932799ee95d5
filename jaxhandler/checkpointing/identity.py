"""What makes a run the same run: its identity as JSON, and what differs between two."""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxhandler.checkpointing.leaves import describe_leaf
from jaxhandler.errors import explain
from jaxhandler.trees import is_key, leaves_with_paths
from jaxhandler.versions import processor

__all__ = [
    "FIELDS",
    "FULL",
    "SAMPLED",
    "check_same",
    "device_text",
    "digest_leaves",
    "key_text",
]

FIELDS = (
    "call",
    "data",
    "batch_size",
    "macrobatch_size",
    "tail",
    "mode",
    "shuffle",
    "epochs",
    "key",
    "members",
    "member_order",
    "strategy",
    "step",
    "metrics",
    "controller",
    "params",
    "state",
    "out",
    "device",
    "sharding",
    "versions",
)
"""What an identity consists of; `state` is the carry a run begins with, `params` its consts."""
FULL = 10**9
"""Bytes up to which all is digested where nobody asks for more or less."""
SAMPLED = 64 * 2**20
"""Bytes that are digested of what is larger."""
_PIECE = 2**20
# Of a field that is a tree, whose leaves mostly differ together, and of any other.
_FEW, _MOST_NAMED = 3, 8
_TREES = ("data", "params", "state")
_TRAINED = re.compile(r"state(\[0\])?\.(step|epoch)")
_LONGEST = 200


def check_same(
    stored: dict[str, Any], seen: dict[str, Any], ignored: tuple[str, ...], path: str
) -> None:
    """Refuses to go on with a run that differs from the one that was stopped.

    Args:
        stored: The identity in the commit.
        seen: The identity of the run that would go on.
        ignored: Fields that may differ.
        path: Where the commits are, for messages.

    Raises:
        ValueError: If they differ; says first whether the state has trained since, names each field
            with both values, of trees the first few leaves, and what to ignore in all.

    Example:
        >>> check_same({"batch_size": 4}, {"batch_size": 8}, ("batch_size",), "run")
        >>> check_same({"batch_size": 4}, {"batch_size": 8}, (), "run")
        Traceback (most recent call last):
        ValueError: run: saw batch_size 8 where 4 is stored, expected the run that was stopped. ...
    """
    fields = dict(_flat({name: stored.get(name) for name in FIELDS if name not in ignored}))
    others = dict(_flat({name: seen.get(name) for name in FIELDS if name not in ignored}))
    wrong = [
        (name, others.get(name, "nothing"), fields.get(name, "nothing"))
        for name in [*fields, *(name for name in others if name not in fields)]
        if others.get(name, "nothing") != fields.get(name, "nothing")
    ]
    if not wrong:
        return
    roots: dict[str, list[str]] = {name: [] for name in ignored}
    trained = [each for each in wrong if _TRAINED.fullmatch(each[0]) and "nothing" not in each]
    for name, new, old in wrong:
        named = roots.setdefault(re.split(r"\W", name)[0], [])
        if (name, new, old) not in trained:
            named.append(f"{name} {_short(new)} where {_short(old)} is stored")
    texts = [_trained_since(*max(trained))] if trained else []
    for root, named in roots.items():
        most = _FEW if root in _TREES else _MOST_NAMED
        texts += named[:most]
        if len(named) > most:
            texts[-1] += f" and {len(named) - most} more"
    fix = "Call it as before to go on, give another run a folder of its own, or pass "
    if trained:
        fix = (
            "Each call needs a folder of its own, in a loop of epochs one for each; to go on, give "
            "the state that the run began with, or pass "
        )
    fix += f'resume="ignore:{",".join(roots)}" if you mean it.'
    expected = "the run that was stopped"
    raise ValueError(explain(path, seen=", ".join(texts), expected=expected, fix=fix))


def _trained_since(name: str, new: str, old: str) -> str:
    """Says in words that a state is not the one that a run began with."""
    word, now, then = name.rpartition(".")[2], *(text.split(" ")[-1] for text in (new, old))
    if not (now.isdecimal() and then.isdecimal()):
        return f"a state of another {word}"
    how = "since" if int(now) > int(then) else "less"
    return f"a state that has trained {how} ({word} {now} where {then} is stored)"


def digest_leaves(tree: Any, extent: str = "auto") -> dict[str, Any]:
    """Returns type and SHA-256 of each leaf by its path: what tells that a tree is the same.

    Single whole numbers stand for themselves, so that a counter can be read in messages.

    Args:
        tree: Any pytree of arrays.
        extent: "full" digests all of each leaf; "sampled" all of a tree of up to 64 MiB, above it
            of each leaf its share of them, spread evenly; "auto" all of a tree of up to 1 GB, and
            as "sampled" above.

    Example:
        >>> digest_leaves({"w": np.zeros(2, np.float32)})["['w']"]
        'float32[2] af5570f5a1810b7a'
        >>> digest_leaves({"step": np.int32(40)})["['step']"]
        'int32[] 40'
    """
    leaves = leaves_with_paths(tree)
    size = sum(getattr(leaf, "nbytes", 0) for _, leaf in leaves)
    whole = extent == "full" or size <= (FULL if extent == "auto" else SAMPLED)
    most = size if whole else SAMPLED // max(len(leaves), 1)
    return {path: f"{describe_leaf(leaf)} {_digest(leaf, most)}" for path, leaf in leaves}


def key_text(key: Any) -> str | None:
    """Returns a random key as text, or None for None."""
    return None if key is None else f"{describe_leaf(key)} {_digest(key, FULL)}"


def device_text(device: Any) -> str:
    """Returns what a device is, as far as the bits of results depend on it.

    Args:
        device: A device. That a CPU is one is all that JAX tells; its name is added, and a digest
            of its instructions, which XLA chooses from.

    Example:
        >>> device_text(jax.devices("cpu")[0])
        'cpu cpu, ..., instructions ...'
    """
    text = f"{device.platform} {device.device_kind}"
    if device.platform != "cpu":
        return text
    lines = processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    instructions = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]
    return f"{text}, {' and '.join(names) or lines[0]}, instructions {instructions}"


def _digest(leaf: Any, most: int) -> str:
    array = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
    if array.ndim == 0 and array.dtype.kind in "iu":
        return str(array)
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    digest = hashlib.sha256()
    if len(data) <= most:
        digest.update(data)
    else:
        count = max(most // _PIECE, 2)
        for start in np.linspace(0, len(data) - _PIECE, count).astype(np.int64):
            digest.update(data[start : start + _PIECE])
    return digest.hexdigest()[:16]


def _flat(field: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(field, dict) and field:
        for key, value in field.items():
            apart = " " if name and key[:1] not in (".", "[", "") else ""
            yield from _flat(value, f"{name}{apart}{key}")
    else:
        yield name, field


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
