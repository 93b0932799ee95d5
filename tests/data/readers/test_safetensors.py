"""`.safetensors` files: every type, and headers that make no sense."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import jaxhandler as jh


def write(path, header, body=bytes(48)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def entry(kind="F32", shape=(4, 3), offsets=(0, 48)):
    return {"dtype": kind, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("kind", ["bool", "i1", "i2", "i4", "u1", "u2", "u4", "f2", "f4"])
def test_numbers_of_every_kind_come_back(kind, tmp_path):
    array = (np.arange(12) % 2).astype(kind).reshape(4, 3)
    safetensors.numpy.save_file({"x": array}, tmp_path / "x.safetensors", {"by": "a test"})
    rows = jh.open_source(tmp_path / "x.safetensors").read(1, 4)
    assert rows.dtype == array.dtype
    np.testing.assert_array_equal(rows, array[1:])


LOW = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


@pytest.mark.parametrize("kind", LOW)
def test_low_precision_comes_back(kind, tmp_path):
    array = np.arange(12).astype(LOW[kind]).reshape(4, 3)
    header = {"x": entry(kind, offsets=(0, array.nbytes))}
    rows = jh.open_source(write(tmp_path / "x.safetensors", header, array.tobytes())).read(1, 3)
    assert rows.dtype == jnp.dtype(LOW[kind])
    np.testing.assert_array_equal(rows.astype(np.float32), array[1:3].astype(np.float32))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 5000,
        {"x": 3},
        {"x": {"dtype": "F32"}},
        {"x": entry(shape="four")},
        {"x": entry(shape=(-4, -3))},
        {"x": entry(shape=(5, 3))},
        {"x": entry(offsets=(-48, 0))},
        {"x": entry(offsets=(0,))},
        {"x": entry(offsets=("0", "48"))},
    ],
    ids=lambda header: str(header)[:40],
)
def test_a_header_that_makes_no_sense_is_refused(header, tmp_path):
    path = write(tmp_path / "x.safetensors", header)
    with pytest.raises(ValueError, match=f"{path}.*: saw no valid .safetensors file"):
        jh.open_source(path)


def test_a_file_shorter_than_its_header_says_is_refused_with_the_row(tmp_path):
    path = write(tmp_path / "x.safetensors", {"x": entry()}, bytes(30))
    with pytest.raises(ValueError, match=rf"{path}\['x'\]: saw \d+ bytes, .*row 2 is cut"):
        jh.open_source(path)


def test_an_unknown_type_is_refused_with_its_column(tmp_path):
    path = write(tmp_path / "x.safetensors", {"x": entry("F4", offsets=(0, 6))})
    with pytest.raises(TypeError, match=rf"{path}\['x'\]: saw type F4, expected one of BOOL"):
        jh.open_source(path)


def test_a_scalar_is_refused_with_its_column(tmp_path):
    safetensors.numpy.save_file(
        {"x": np.zeros(3, np.float32), "step": np.array(3)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(ValueError, match=r"x.safetensors\['step'\]: saw a scalar"):
        jh.open_source(tmp_path / "x.safetensors")
