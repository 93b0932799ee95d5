"""Errors of libraries name the file, as damage or as what the system said."""

import pytest

from jaxhandler.data.readers.reader import reading


@pytest.mark.parametrize("error", [KeyError("codec"), OSError("cut short")])
def test_what_a_library_raises_of_a_file_is_damage(error):
    with (
        pytest.raises(ValueError, match=r"a\.zarr: saw no valid Zarr file \(.*, in rows 0 to 8"),
        reading("a.zarr", "Zarr", (KeyError, OSError), lambda: "rows 0 to 8"),
    ):
        raise error


def test_what_the_system_says_stays_so_and_gets_the_name():
    with (
        pytest.raises(OSError, match=r"\[Errno 5\] Input/output error: 'a.h5'") as caught,
        reading("a.h5", "HDF5", (OSError, RuntimeError)),
    ):
        raise OSError(5, "Input/output error")
    assert caught.value.errno == 5


@pytest.mark.parametrize("error", [MemoryError(), ValueError("a shape")])
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as caught, reading("a.h5", "HDF5", (OSError, MemoryError)):
        raise error
    assert caught.value is error
