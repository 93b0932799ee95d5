"""Who else serves a model at any number of rows: ONNX Runtime, tract, and JAX by hand."""

import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.inferer_models import Model

__all__ = ["PEERS", "Serve", "check_parity"]

Serve = Callable[[np.ndarray], np.ndarray]


def by_onnxruntime(model: Model) -> Serve:
    """Returns ONNX Runtime with one thread; it takes any number of rows as it is."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    content = _onnx(model).SerializeToString()
    session: Any = onnxruntime.InferenceSession(
        content, options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x": x})[0]


def by_tract(model: Model) -> Serve:
    """Returns tract as the ancestor used it: a plan of each number of rows, kept."""
    import onnx
    import tract

    folder, states = tempfile.TemporaryDirectory(), {}
    path = str(Path(folder.name) / "model.onnx")
    onnx.save(_onnx(model), path)
    shape = ",".join(map(str, model.example.shape[1:]))

    def serve(x: np.ndarray) -> np.ndarray:
        state = states.get(len(x))
        if state is None:
            # What is loaded is used up when a plan is made of it.
            loaded = tract.onnx().load(path)
            loaded.set_input_fact(0, f"{len(x)},{shape},f32")
            state = states[len(x)] = loaded.into_model().into_runnable().spawn_state()
        return state.run([x])[0].to_numpy()

    weakref.finalize(serve, folder.cleanup)
    return serve


def by_jit(model: Model) -> Serve:
    """Returns `jax.jit`, which compiles for each number of rows."""
    # A function of its own, so that it compiles even where another peer has.
    jitted = jax.jit(lambda params, x: model.apply_fn(params, x))
    params = jax.device_put(model.params)
    return lambda x: np.array(jitted(params, x))


def plan_of(model: Model, num_rows: int) -> Callable[[Any, Any], Any]:
    """Compiles a model for a number of rows, parameters being arguments."""
    rows = jax.ShapeDtypeStruct((num_rows, *model.example.shape[1:]), np.float32)
    jitted = jax.jit(lambda params, x: model.apply_fn(params, x))
    return jitted.lower(model.params, rows).compile()


def plans_by_hand(model: Model) -> Serve:
    """Returns a dictionary of plans compiled ahead of time, a plan of each number of rows."""
    params, plans = jax.device_put(model.params), {}

    def serve(x: np.ndarray) -> np.ndarray:
        plan = plans.get(len(x))
        if plan is None:
            plan = plans[len(x)] = plan_of(model, len(x))
        return np.array(plan(params, x))

    return serve


PEERS: dict[str, Callable[[Model], Serve]] = {
    "onnxruntime": by_onnxruntime,
    "tract": by_tract,
    "jit": by_jit,
    "dictionary": plans_by_hand,
}


def check_parity(peers: dict[str, Serve], model: Model) -> None:
    """Refuses peers that do not compute the same, of which no timing would mean anything."""
    for rows in (1, 3, 8):
        x = model.example[:rows].copy()
        expected = np.asarray(model.apply_fn(model.params, x))
        for name, serve in peers.items():
            scale = abs(expected).max()
            np.testing.assert_allclose(serve(x), expected, atol=1e-5 * scale, err_msg=name)


def _onnx(model: Model) -> Any:
    """The same model and parameters for the others, with a free number of rows."""
    from onnx import TensorProto, checker, helper, numpy_helper

    nodes: list[Any] = []
    weights: list[Any] = []
    at = "x"

    def add(kind: str, *values: np.ndarray, **attributes: Any) -> None:
        nonlocal at
        names = [at]
        for value in values:
            names.append(f"w{len(weights)}")
            weights.append(numpy_helper.from_array(np.ascontiguousarray(value), names[-1]))
        at = f"{kind}{len(nodes)}"
        nodes.append(helper.make_node(kind, names, [at], **attributes))

    def of(layer: str) -> tuple[np.ndarray, np.ndarray]:
        kernel, bias = model.params[layer]
        return kernel, bias

    if model.name == "MLP":
        for layer in model.params:
            add("Gemm", *of(layer))
            if layer != "dense2":
                add("Relu")
    else:
        # Channels come first there. One channel, so that moving it costs nothing.
        add("Reshape", np.array([0, 1, 28, 28]))
        for layer in ("conv0", "conv1"):
            kernel, bias = of(layer)
            add("Conv", kernel.transpose(3, 2, 0, 1), bias, pads=[1, 1, 1, 1])
            add("Relu")
            add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
        kernel, bias = of("dense")
        add("Flatten")
        add("Gemm", kernel.reshape(7, 7, 32, 10).transpose(2, 0, 1, 3).reshape(-1, 10), bias)
    float32 = TensorProto.FLOAT
    rows = helper.make_tensor_value_info("x", float32, ["N", *model.example.shape[1:]])
    outputs = {"MLP": 8, "conv": 10}[model.name]
    nodes.append(helper.make_node("Identity", [at], ["y"]))
    result = helper.make_tensor_value_info("y", float32, ["N", outputs])
    graph = helper.make_graph(nodes, "model", [rows], [result], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    checker.check_model(made)
    return made
