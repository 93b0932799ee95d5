"""Arrays behind URLs and TensorStore specs: many chunks at once, and those that are missing."""

import functools
import http.server
import os
import shutil
import threading
import time

import numpy as np
import pytest
import tensorstore
import zarr

import jaxhandler as jh

# Reads of a few rows from chunks of as few: what test_advice.py asks for.
pytestmark = pytest.mark.filterwarnings("ignore:.*as large as a macrobatch")


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(22, 4)).astype(np.float32)


@pytest.fixture
def path(x, tmp_path):
    array = zarr.create_array(tmp_path / "x.zarr", shape=x.shape, chunks=(5, 4), dtype=x.dtype)
    array[...] = x
    return tmp_path / "x.zarr"


def spec_of(path, **options):
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}, **options}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files slowly, and counts how many requests for chunks are under way."""

    lock = threading.Lock()
    under_way = most = 0

    def do_GET(self):
        with self.lock:
            Handler.under_way += "/c/" in self.path
            Handler.most = max(Handler.most, Handler.under_way)
        time.sleep(0.02 if "/c/" in self.path else 0)
        super().do_GET()
        with self.lock:
            Handler.under_way -= "/c/" in self.path

    def log_message(self, *arguments):
        pass


@pytest.fixture
def url(path):
    handler = functools.partial(Handler, directory=str(path.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/x.zarr/"
        server.shutdown()
        thread.join()


def test_the_chunks_of_a_read_are_fetched_at_once(url, x):
    source = jh.open_source({"x": url})
    Handler.most = 0
    np.testing.assert_array_equal(source.read(0, 22)["x"], x)
    assert Handler.most > 2


def test_opening_fetches_no_chunk(url):
    Handler.most = 0
    assert jh.open_source(url).specs.shape == (22, 4)
    assert Handler.most == 0


@pytest.mark.parametrize(
    "make",
    [spec_of, lambda path: f"file://{path}/", lambda path: f"file://{path}/|zarr3:"],
    ids=["spec", "url", "url with a driver"],
)
def test_a_missing_chunk_is_refused_or_filled(make, x, path):
    shutil.rmtree(path / "c" / "1")
    source = jh.open_source({"x": make(path)})
    np.testing.assert_array_equal(source.read(0, 5)["x"], x[:5])
    for read in (lambda: source.read(4, 6), lambda: source.take(np.array([0, 6]))):
        with pytest.raises(ValueError, match='NOT_FOUND: chunk .*missing_chunks="fill"'):
            read()
    x[5:10] = 0
    filled = jh.open_source({"x": make(path)}, missing_chunks="fill")
    np.testing.assert_array_equal(filled.read(0, 22)["x"], x)


def test_what_a_spec_says_of_missing_chunks_itself_holds(x, path):
    shutil.rmtree(path / "c" / "1")
    spec = spec_of(path, fill_missing_data_reads=True)
    x[5:10] = 0
    np.testing.assert_array_equal(jh.open_source(spec).read(0, 22), x)
    assert spec["fill_missing_data_reads"] is True


def test_a_missing_chunk_behind_a_view_is_refused(x, path):
    view = {"driver": "cast", "dtype": "float16", "base": spec_of(path)}
    np.testing.assert_array_equal(jh.open_source(view).read(3, 9), x[3:9].astype(np.float16))
    shutil.rmtree(path / "c" / "1")
    with pytest.raises(ValueError, match="NOT_FOUND"):
        jh.open_source(view).read(3, 9)


def test_rows_are_counted_from_nought_wherever_the_domain_begins(x, path):
    store = tensorstore.open(spec_of(path)).result()[4:20].translate_by[100, 3]
    np.testing.assert_array_equal(jh.open_source(store).read(2, 7), x[6:11])


def test_a_cut_chunk_is_refused_with_its_rows(path):
    os.truncate(path / "c" / "1" / "0", 9)
    with pytest.raises(ValueError, match=r"data: saw no rows 0 to 22 \(.*c/1/0"):
        jh.open_source(spec_of(path)).read(0, 22)


@pytest.mark.parametrize(
    "data",
    [
        "file:///nowhere/x.zarr/",
        "nothing://x.zarr",
        {"driver": "no such driver"},
        {"driver": "zarr3", "kvstore": 3},
    ],
    ids=str,
)
def test_what_cannot_be_opened_is_refused_by_name(data):
    name = data if isinstance(data, str) else r"data\['x'\]"
    with pytest.raises(ValueError, match=f"{name}: saw what TensorStore cannot open"):
        jh.open_source({"x": data})


def test_a_group_behind_a_url_is_refused_with_what_to_do(tmp_path):
    zarr.create_group(tmp_path / "x.zarr")
    with pytest.raises(ValueError, match="Name one array, not a group"):
        jh.open_source(f"file://{tmp_path}/x.zarr/")


def test_a_scalar_is_refused(tmp_path):
    zarr.create_array(tmp_path / "x.zarr", shape=(), dtype="f4")[...] = 3
    with pytest.raises(ValueError, match="data: saw a scalar"):
        jh.open_source(spec_of(tmp_path / "x.zarr"))


def test_text_is_refused():
    spec = {"driver": "array", "dtype": "string", "array": ["ada", "grace"], "rank": 1}
    with pytest.raises(TypeError, match="data: saw dtype object"):
        jh.open_source(spec)


def test_a_column_called_driver_is_a_column(x, tmp_path):
    np.save(tmp_path / "x.npy", x)
    source = jh.open_source({"driver": str(tmp_path / "x.npy"), "car": x})
    assert sorted(source.specs) == ["car", "driver"]
    assert sorted(jh.open_source({"driver": x}).specs) == ["driver"]
