"""Policies: how a number of rows becomes calls of plans. `jh.policies` is this module."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxhandler.errors import check_count, check_counts, explain
from jaxhandler.inference.buckets import Observed, learned_buckets

__all__ = [
    "Part",
    "Policy",
    "adaptive",
    "buckets",
    "exact",
    "fixed",
    "from_spec",
    "multiples",
    "powers_of_two",
    "single",
]


class Part(NamedTuple):
    """Some rows of a request, and the bucket whose plan computes them.

    Attributes:
        rows: How many.
        bucket: Rows of the plan; more than `rows` where some are added and trimmed again.

    Example:
        >>> Part(3, 4).bucket
        4
    """

    rows: int
    bucket: int


class Policy(NamedTuple):
    """How a number of rows becomes calls of plans.

    Attributes:
        parts: `parts(num_rows)`, pure: the parts of a request in the order of its rows.
        spec: A dictionary of JSON from which `from_spec` makes the policy again.
        sizes: The buckets there can be, ascending; empty where any size may become one.
        mixes: Whether rows meet others than those of their own request's call by `exact`: where a
            policy pads or splits, the rows of a model must not influence each other.
        max_plans: The most plans it makes use of; None for no bound of its own.
        learn: For policies that learn: `learn(observed)` gives the policy to go on with.

    Example:
        >>> powers_of_two(8).parts(11)
        (Part(rows=8, bucket=8), Part(rows=3, bucket=4))
    """

    parts: Callable[[int], tuple[Part, ...]]
    spec: dict[str, Any]
    sizes: tuple[int, ...] = ()
    mixes: bool = True
    max_plans: int | None = None
    learn: Callable[[Observed], "Policy"] | None = None


def exact() -> Policy:
    """Makes the policy of one plan per number of rows: nothing is padded, every size compiles.

    For few sizes that come again and again, and for models whose rows influence each other.

    Returns:
        A `Policy`.

    Example:
        >>> exact().parts(5)
        (Part(rows=5, bucket=5),)
    """
    return Policy(lambda num_rows: (Part(num_rows, num_rows),), {"name": "exact"}, mixes=False)


def buckets(sizes: Iterable[int]) -> Policy:
    """Makes the policy of the given sizes: rows are padded up to the next of them.

    More rows than the largest are split: as many calls of the largest as it takes, and the rest.

    Args:
        sizes: The buckets, in any order.

    Returns:
        A `Policy`.

    Raises:
        TypeError: If a size is not a whole number.
        ValueError: If there are none, or one is below one.

    Example:
        >>> buckets((1, 4, 16)).parts(18)
        (Part(rows=16, bucket=16), Part(rows=2, bucket=4))
    """
    chosen = _checked(sizes)
    return _padding(chosen, {"name": "buckets", "sizes": list(chosen)})


def powers_of_two(largest: int) -> Policy:
    """Makes the policy of the buckets 1, 2, 4, ... `largest`: few plans for any sizes.

    Up to half of the rows computed are added ones; about a quarter where all sizes are as likely.

    Args:
        largest: The largest bucket, a power of two.

    Returns:
        A `Policy`.

    Raises:
        TypeError: If `largest` is not a whole number.
        ValueError: If it is no power of two.

    Example:
        >>> powers_of_two(64).sizes
        (1, 2, 4, 8, 16, 32, 64)
    """
    largest = check_count("largest", largest)
    if largest & (largest - 1):
        below = 1 << (largest.bit_length() - 1)
        fix = f"Use {below} or {2 * below}, or jh.policies.buckets with sizes of your own."
        text = explain("largest", seen=str(largest), expected="a power of two", fix=fix)
        raise ValueError(text)
    sizes = tuple(1 << power for power in range(largest.bit_length()))
    return _padding(sizes, {"name": "powers_of_two", "largest": largest})


def multiples(of: int, largest: int) -> Policy:
    """Makes the policy of the buckets `of`, 2 `of`, 3 `of`, ... `largest`: little padding.

    Args:
        of: The smallest bucket, and what lies between two.
        largest: The largest bucket, a multiple of it.

    Returns:
        A `Policy`.

    Raises:
        TypeError: If an argument is not a whole number.
        ValueError: If `largest` is no multiple of `of`.

    Example:
        >>> multiples(8, 32).parts(17)
        (Part(rows=17, bucket=24),)
    """
    of, largest = check_count("of", of), check_count("largest", largest)
    if largest % of:
        fix = f"Use {-(-largest // of) * of}."
        text = explain("largest", seen=str(largest), expected=f"a multiple of {of}", fix=fix)
        raise ValueError(text)
    sizes = tuple(range(of, largest + 1, of))
    return _padding(sizes, {"name": "multiples", "of": of, "largest": largest})


def fixed(sizes: Iterable[int]) -> Policy:
    """Makes the policy that splits rows greedily into the given sizes and never pads.

    The size 1 is added, so that nothing is left over. For models of which a row costs much. With
    `background=True` larger plans stand in, padded, for those that are not there yet.

    Args:
        sizes: The buckets, in any order.

    Returns:
        A `Policy`.

    Raises:
        TypeError: If a size is not a whole number.
        ValueError: If there are none, or one is below one.

    Example:
        >>> [part.bucket for part in fixed((4, 2, 1)).parts(7)]
        [4, 2, 1]
    """
    given = _checked(sizes)
    chosen = tuple(sorted({1, *given}))

    def parts(num_rows: int) -> tuple[Part, ...]:
        found, left = [], num_rows
        for size in reversed(chosen):
            found += [Part(size, size)] * (left // size)
            left %= size
        return tuple(found)

    return Policy(parts, {"name": "fixed", "sizes": list(given)}, chosen)


def single() -> Policy:
    """Makes the policy of one row at a time: one plan, as many calls as rows.

    Returns:
        A `Policy`.

    Example:
        >>> len(single().parts(3))
        3
    """
    return Policy(lambda num_rows: (Part(1, 1),) * num_rows, {"name": "single"}, (1,))


def adaptive(max_plans: int) -> Policy:
    """Makes the policy that learns its buckets from the sizes it sees and the times it measures.

    It begins with powers of two. From time to time, ever more rarely, it chooses the buckets under
    which all requests so far would have cost least, compiling what is not compiled yet included: so
    a plan is compiled once the padding it spares has cost as much as the plan will.

    Args:
        max_plans: The most plans to hold.

    Returns:
        A `Policy`.

    Raises:
        TypeError: If `max_plans` is not a whole number.
        ValueError: If it is below one.

    Example:
        >>> adaptive(8).parts(5)
        (Part(rows=5, bucket=8),)
    """
    return _learned(check_count("max_plans", max_plans), ())


def from_spec(spec: Mapping[str, Any]) -> Policy:
    """Makes a policy again from its `spec`.

    Args:
        spec: As `Policy.spec` had it.

    Returns:
        The policy; one that learns begins with the buckets it had learnt.

    Raises:
        ValueError: If it describes none.

    Example:
        >>> from_spec(multiples(8, 32).spec).sizes
        (8, 16, 24, 32)
    """
    makers: dict[str, Callable[..., Policy]] = {
        "exact": exact,
        "buckets": buckets,
        "powers_of_two": powers_of_two,
        "multiples": multiples,
        "fixed": fixed,
        "single": single,
        "adaptive": lambda max_plans, sizes: _learned(
            check_count("max_plans", max_plans), _checked(sizes) if sizes else ()
        ),
    }
    arguments = {name: value for name, value in spec.items() if name != "name"}
    try:
        return makers[spec["name"]](**arguments)
    except (KeyError, TypeError) as error:
        expected = "one of " + ", ".join(makers) + " and its arguments"
        raise ValueError(explain("policy", seen=repr(dict(spec)), expected=expected)) from error


def _checked(sizes: Iterable[int]) -> tuple[int, ...]:
    chosen = tuple(sorted(set(check_counts("sizes", sizes))))
    if not chosen:
        raise ValueError(explain("sizes", seen="none", expected="at least one"))
    return chosen


def _padding(sizes: tuple[int, ...], spec: dict[str, Any]) -> Policy:
    largest = sizes[-1]

    def parts(num_rows: int) -> tuple[Part, ...]:
        whole, rest = divmod(num_rows, largest)
        last = (Part(rest, sizes[bisect_left(sizes, rest)]),) if rest else ()
        return (Part(largest, largest),) * whole + last

    return Policy(parts, spec, sizes)


def _learned(max_plans: int, sizes: tuple[int, ...]) -> Policy:
    known = _padding(sizes, {}) if sizes else None

    def parts(num_rows: int) -> tuple[Part, ...]:
        if known and num_rows <= sizes[-1]:
            return known.parts(num_rows)
        return (Part(num_rows, 1 << (num_rows - 1).bit_length()),)

    def learn(observed: Observed) -> Policy:
        return _learned(max_plans, learned_buckets(observed, max_plans))

    spec = {"name": "adaptive", "max_plans": max_plans, "sizes": list(sizes)}
    return Policy(parts, spec, sizes, max_plans=max_plans, learn=learn)
