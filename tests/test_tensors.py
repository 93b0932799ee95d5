"""The safetensors format, written and read."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxhandler.tensors import decode, encode

DTYPES = [
    "bool", "int8", "uint8", "int16", "uint32", "int64", "float16", "bfloat16", "float32",
    "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz",
    "int4", "uint4",
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 3)])
def test_arrays_come_back_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    array = (4 * rng.normal(size=shape)).astype(np.dtype(getattr(jnp, dtype, dtype)))
    data = b"".join(encode({"before": np.ones(3, np.int8), "x": array}))
    found = decode(data, [("x", shape, dtype)])[0]
    assert found.dtype == array.dtype
    assert found.shape == shape
    assert found.tobytes() == array.tobytes()


def test_the_library_reads_what_is_written() -> None:
    arrays = {"w/a": np.arange(6.0).reshape(2, 3), "b": np.float32(3) * np.ones(())}
    found = safetensors.numpy.load(b"".join(encode(arrays)))
    assert {name: array.tolist() for name, array in found.items()} == {
        name: array.tolist() for name, array in arrays.items()
    }


def test_what_the_library_writes_is_read() -> None:
    array = np.arange(6, dtype=np.int16).reshape(3, 2)
    data = safetensors.numpy.save({"x": array})
    np.testing.assert_array_equal(decode(data, [("x", (3, 2), "int16")])[0], array)


def test_arrays_that_are_not_contiguous_are_written_in_order() -> None:
    array = np.arange(12.0).reshape(3, 4).T
    data = b"".join(encode({"x": array}))
    np.testing.assert_array_equal(decode(data, [("x", (4, 3), "float64")])[0], array)


@pytest.mark.parametrize(
    ("kinds", "cut"),
    [
        ([("y", (3,), "float32")], 0),
        ([("x", (4,), "float32")], 0),
        ([("x", (3,), "int32")], 0),
        ([("x", (3,), "linalg")], 0),
        ([("x", (3,), "float32")], 1),
        ([("x", (3,), "float32")], 20),
    ],
)
def test_files_that_hold_something_else_are_refused(
    kinds: list[tuple[str, tuple[int, ...], str]], cut: int
) -> None:
    data = b"".join(encode({"x": np.zeros(3, np.float32)}))
    with pytest.raises(ValueError, match="here: saw no valid safetensors file"):
        decode(data[: len(data) - cut], kinds, "here")
