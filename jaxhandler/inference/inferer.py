"""The memoising inferer: a model for any number of rows, one compiled plan per bucket."""

import os
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax

from jaxhandler.errors import a_type, check_count, check_counts, explain
from jaxhandler.inference import artifact
from jaxhandler.inference.agents import Agents, as_agents
from jaxhandler.inference.engine import Engine
from jaxhandler.inference.layers import Layer, Layers, check_same_form
from jaxhandler.inference.named import check_row, join_rows, refuse_hidden, split_rows
from jaxhandler.inference.parameters import beside, check_like, on_device
from jaxhandler.inference.policies import Policy
from jaxhandler.inference.stats import InfererStats

__all__ = ["MemoizingInferer", "check_inferer"]


class MemoizingInferer:
    """A model to be called with any number of rows; made by `jh.memoizing_inferer`.

    Safe to use from several threads. It remembers plans and what they cost; of the rows nothing,
    but for what `jh.recurrent` and `jh.with_epsilon` keep of agents.

    Attributes:
        params: The parameters, on the device.
        engine: The plans, shared with all that `with_params` and wrappers made.
        agents: What wrappers do and know of agents; None without wrappers.
        inputs: The form of what a caller gives.
        outputs: The form of what a caller gets.

    Example:
        >>> import numpy as np, jaxhandler as jh
        >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros((1, 3), np.float32))
        >>> infer(np.ones((1, 3), np.float32))
        array([[2., 2., 2.]], dtype=float32)
        >>> infer
        MemoizingInferer(float32[rows, 3] -> float32[rows, 3], exact: 1 plan (1), ...)
    """

    def __init__(self, engine: Engine, params: Any, agents: Agents | None = None) -> None:
        self.engine, self.params, self.agents = engine, params, agents
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self._hidden: Collection[str] = ()
        if agents is not None:
            self.inputs, self.outputs = agents.layers.inputs, agents.layers.outputs
            self._hidden = agents.layers.hidden
            engine.accompany(agents.plans)
        self._leaves = () if engine.frozen is not None else tuple(jax.tree.leaves(params))

    def __call__(
        self, inputs: Any, *, agents: Sequence[Hashable] | None = None, device: bool = False
    ) -> Any:
        """Computes the outputs of some rows.

        Args:
            inputs: NumPy or JAX arrays `[N, ...]`, a tree like the example, any `N`.
            agents: Whose the rows are, `N` different ones, where wrappers tell agents apart; None
                for the agents 0 to `N - 1`.
            device: Whether to keep JAX arrays where nothing has to be trimmed or joined.

        Returns:
            NumPy arrays `[N, ...]` of the caller's own, a tree like that of `apply_fn`.

        Raises:
            TypeError: If a leaf is no array, is traced, or has another dtype.
            ValueError: If tree, rank or width is another, `N` differs, or an agent comes twice.
            OverflowError: If a 64-bit integer does not fit.
            SealedError: If a plan would have to be compiled after `seal`.
        """
        if self.agents is None and agents is None:
            return self.engine.run(self._leaves, inputs, device)
        if self._hidden:
            refuse_hidden(inputs, self._hidden)
        num_rows, leaves = self.inputs.check(self.inputs.leaves(inputs))
        whose = range(num_rows) if agents is None else as_agents(agents, num_rows)
        if self.agents is None:
            found = self.engine.run_parts(self._leaves, num_rows, leaves, device)
        else:
            found = self.agents.run(self.engine, self._leaves, num_rows, leaves, whose, device)
        return self.outputs.unflatten(found)

    def single(self, inputs: Any) -> Any:
        """Computes the outputs of one row, of agent 0 where agents have states.

        Args:
            inputs: A tree like the example, without a row axis; lists of numbers will do.

        Returns:
            A tree of NumPy arrays without a row axis.

        Raises:
            TypeError: If a leaf is no array or has another dtype.
            ValueError: If an input is missing or unknown, or a shape is another one.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> example = {"x": np.zeros((1, 3), np.float32)}
            >>> infer = jh.memoizing_inferer(lambda w, x: {"y": w * x["x"]}, 2.0, example)
            >>> infer.single({"x": [1, 2, 3]})
            {'y': array([2., 4., 6.], dtype=float32)}
        """
        return self.batch({0: inputs})[0]

    def batch(self, requests: Mapping[Any, Any]) -> dict[Any, Any]:
        """Computes one row of each of some agents, all in one request.

        Args:
            requests: Each agent's inputs, a tree without a row axis; lists of numbers will do.

        Returns:
            Each agent's outputs, a tree of NumPy arrays of its own, in the order of `requests`.

        Raises:
            TypeError: If `requests` is no mapping, a leaf no array, or of another dtype.
            ValueError: If an agent's input is missing, unknown or misshapen; nothing has changed.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> example = {"x": np.zeros((1, 2), np.float32)}
            >>> infer = jh.memoizing_inferer(lambda w, x: {"y": w * x["x"]}, 2.0, example)
            >>> infer.batch({"left": {"x": [1, 2]}, "right": {"x": [3, 4]}})["right"]
            {'y': array([6., 8.], dtype=float32)}
        """
        if not isinstance(requests, Mapping):
            expected = "each agent's inputs, {agent: inputs}"
            raise TypeError(explain("requests", seen=a_type(requests), expected=expected))
        rows = {agent: self._row(agent, inputs) for agent, inputs in requests.items()}
        if not rows:
            return {}
        outputs = self(join_rows(self.inputs, list(rows.values())), agents=list(rows))
        return dict(zip(rows, split_rows(self.outputs, outputs), strict=True))

    def check_row(self, agent: Hashable, inputs: Any) -> list[Any]:
        """Returns the leaves of one agent's inputs, refusing what does not fit.

        Args:
            agent: Whose they are.
            inputs: A tree without a row axis.

        Returns:
            NumPy arrays; those given that fit as they are.

        Raises:
            TypeError: If a leaf is no array or has another dtype, or `agent` cannot be told apart.
            ValueError: If an input is missing or unknown, or a shape is another one.
        """
        if self.agents is not None:
            self.agents.check((agent,))
        return self._row(agent, inputs)

    def _row(self, agent: Hashable, inputs: Any) -> list[Any]:
        return check_row(self.inputs, inputs, f"inputs of agent {agent!r}", self._hidden)

    def begin_agent(self, agent: Hashable) -> None:
        """Gives an agent a state of zeros, and noise from its start, whatever it had before.

        Nothing happens where no wrapper keeps anything of agents.

        Args:
            agent: A number, a name, or anything else hashable.

        Raises:
            TypeError: If it is not hashable.
            SealedError: If there is no memory for one more after `seal`.
        """
        if self.agents is not None:
            self.agents.begin(agent, self.engine.sealed)

    def end_agent(self, agent: Hashable) -> None:
        """Forgets an agent; nothing happens where it is unknown.

        Args:
            agent: As given to `begin_agent`.
        """
        if self.agents is not None:
            self.agents.end(agent)

    def preload(self, sizes: Iterable[int]) -> None:
        """Compiles what requests of these numbers of rows will need; returns when it is done.

        Args:
            sizes: Numbers of rows.

        Raises:
            TypeError: If one is not a whole number.
            ValueError: If one is below one.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros((1, 3), np.float32))
            >>> infer.preload((1, 8))
            >>> infer.stats().compiles
            2
        """
        counts = check_counts("sizes", sizes)
        if self.agents is None:
            self.engine.preload(counts)
        else:
            self.agents.preload(self.engine, counts)

    def select_batch_size(self, num_rows: int) -> int:
        """Returns how many of `num_rows` waiting rows to send in one call, so that one plan runs.

        Args:
            num_rows: How many wait; at least one.

        Returns:
            A number from 1 to `num_rows`.

        Raises:
            TypeError: If `num_rows` is not a whole number.
            ValueError: If it is below one.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> example, policy = np.zeros((1, 3), np.float32), jh.policies.fixed((8, 4))
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, example, policy=policy)
            >>> infer.select_batch_size(7)
            4
        """
        return self.engine.policy.parts(check_count("num_rows", num_rows))[0].rows

    def predict_seconds(self, num_rows: int) -> float:
        """Returns how long a call with `num_rows` rows will take, compiles it needs included.

        Args:
            num_rows: How many; at least one.

        Returns:
            Seconds, from what calls and compiles took so far; 0 where nothing was measured yet.

        Raises:
            TypeError: If `num_rows` is not a whole number.
            ValueError: If it is below one.
        """
        seconds = self.engine.predict(check_count("num_rows", num_rows))
        more = 0 if self.agents is None else self.agents.missing(self.engine, num_rows)
        return seconds + more * self.engine.costs.compile_seconds()

    def seal(self) -> None:
        """From now on refuses to compile: a request that needs it raises `SealedError`.

        For services that must not stall. It holds for all inferers that share the plans.
        """
        self.engine.seal()

    def wait(self) -> None:
        """Waits until no plan is being compiled in the background."""
        self.engine.wait()

    def with_params(self, params: Any) -> "MemoizingInferer":
        """Makes an inferer of other parameters that shares plans and agents; compiles nothing.

        Args:
            params: A tree of the same structure, shapes and dtypes.

        Returns:
            A `MemoizingInferer`.

        Raises:
            TypeError: If a leaf has another dtype.
            ValueError: If the tree or a shape is another one, or parameters are frozen.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros((1, 1), np.float32))
            >>> infer.with_params(3.0)(np.ones((1, 1), np.float32))
            array([[3.]], dtype=float32)
        """
        if self.engine.frozen is not None:
            fix = "Make the inferer with freeze=False, or a new one of the new parameters."
            text = explain("params", seen="freeze=True", expected="parameters apart", fix=fix)
            raise ValueError(text)
        new = on_device(params)
        check_like(new, self.params)
        return MemoizingInferer(self.engine, beside(new, self.params), self.agents)

    def replace_model(self, new: "MemoizingInferer") -> "MemoizingInferer":
        """Makes an inferer of another model under this one's wrappers; agents keep their states.

        Args:
            new: An inferer whose model takes and gives the same names, shapes and dtypes. What
                wraps it is left behind.

        Returns:
            A `MemoizingInferer` that shares the agents with this one.

        Raises:
            TypeError: If `new` is no inferer.
            ValueError: If the model takes or gives anything else; names the difference.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> example = np.zeros((1, 1), np.float32)
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, example)
            >>> infer = infer.replace_model(jh.memoizing_inferer(lambda w, x: x - w, 2.0, example))
            >>> infer(np.ones((1, 1), np.float32))
            array([[-1.]], dtype=float32)
        """
        check_inferer("new", new)
        check_same_form("new.raw_input_specs", new.engine.inputs, self.engine.inputs)
        check_same_form("new.raw_output_specs", new.engine.outputs, self.engine.outputs)
        return MemoizingInferer(new.engine, new.params, self.agents)

    def with_layer(self, layer: Layer) -> "MemoizingInferer":
        """Makes an inferer with one more layer, which shares the plans and begins without agents.

        Args:
            layer: Which inputs to fill and which outputs to keep, and how.

        Returns:
            A `MemoizingInferer`.

        Raises:
            ValueError: If a name is unknown or hidden already, none is left for the caller, or rows
                are not on the first axis.
        """
        engine, others = self.engine, () if self.agents is None else self.agents.layers.all
        layers = Layers(engine.inputs, engine.outputs, (*others, layer))
        agents = Agents(layers, engine.plans.max_plans, self._leaves)
        return MemoizingInferer(engine, self.params, agents)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes an artifact from which `jh.load_inferer` makes an inferer, without this code.

        A folder: the model as StableHLO for any number of rows, on cpu, cuda and tpu (or those it
        can be lowered for), parameters in the safetensors format, and a manifest with names, types,
        sizes seen and the SHA-256 of every file. Killed, a save leaves the artifact that was there
        or the new one. Of an inferer with wrappers, it is the model under them.

        Args:
            directory: The folder; an artifact that lies there is replaced.

        Raises:
            FileExistsError: If something else lies there, or files of yours in the artifact.
            ImportError: If flatbuffers is not installed; names the extra.
            OSError: If it cannot be written.
            TypeError: If a dict has keys that are neither text nor whole numbers.
            ValueError: If the model cannot be exported for any number of rows.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros((1, 1), np.float32))
            >>> infer.save("model")
            >>> jh.load_inferer("model")(np.ones((1, 1), np.float32))
            array([[2.]], dtype=float32)
        """
        artifact.save(self.engine, self.params, directory)

    def stats(self) -> InfererStats:
        """Returns what was done so far with the model's plans, by all that share them."""
        return self.engine.stats()

    @property
    def apply_fn(self) -> Callable[..., Any]:
        """The model under all wrappers, `apply_fn(params, inputs)`: for `jit` and handlers.

        These take rows first: of an ensemble's `[E, N, ...]` use `jnp.moveaxis(outputs, 1, 0)`.
        """
        return self.engine.apply_fn

    @property
    def policy(self) -> Policy:
        """How requests become calls; one that learns is another one from time to time."""
        return self.engine.policy

    @property
    def raw_input_specs(self) -> Any:
        """What the model takes, a tree of `jax.ShapeDtypeStruct`, shapes of one row."""
        return self.engine.inputs.tree

    @property
    def raw_output_specs(self) -> Any:
        """What the model gives, a tree of `jax.ShapeDtypeStruct`, shapes of one row."""
        return self.engine.outputs.tree

    @property
    def input_specs(self) -> Any:
        """What a caller gives, a tree of `jax.ShapeDtypeStruct`, shapes of one row."""
        return self.inputs.tree

    @property
    def output_specs(self) -> Any:
        """What a caller gets, a tree of `jax.ShapeDtypeStruct`, shapes of one row."""
        return self.outputs.tree

    def __repr__(self) -> str:
        wrapped = f"{self.agents}, " if self.agents is not None else ""
        return f"{type(self).__name__}({self.inputs} -> {self.outputs}, {wrapped}{self.engine})"


def check_inferer(argument: str, infer: Any) -> None:
    """Refuses what is no `MemoizingInferer` with a TypeError."""
    if not isinstance(infer, MemoizingInferer):
        expected = "an inferer, what jh.memoizing_inferer makes"
        raise TypeError(explain(argument, seen=a_type(infer), expected=expected))
