"""Identities: what differs is named, and nothing else."""

import jax
import numpy as np
import optax
import pytest

import jaxhandler as jh
from jaxhandler import files
from jaxhandler.checkpointing import identity
from jaxhandler.checkpointing.commits import commits_in
from jaxhandler.checkpointing.identity import FIELDS, check_same, digest_leaves


def test_every_difference_is_named_with_both_values():
    stored = {"batch_size": 4, "data": {"rows": 9, "['x']": "float32[N] aa"}, "epochs": 3}
    seen = {"batch_size": 8, "data": {"rows": 9, "['x']": "float32[N] bb"}, "epochs": 3}
    with pytest.raises(ValueError, match="expected the run that was stopped") as caught:
        check_same(stored, seen, (), "run")
    text = str(caught.value)
    assert "batch_size 8 where 4 is stored" in text
    assert "data['x'] float32[N] bb where float32[N] aa is stored" in text
    assert "epochs" not in text
    assert "rows" not in text
    assert 'resume="ignore:data,batch_size"' in text or 'resume="ignore:batch_size,data"' in text


def test_what_to_ignore_is_named_with_what_is_ignored_already():
    stored, seen = {"mode": "scan", "step": "aa", "tail": "pad"}, {"mode": "loop", "step": "bb"}
    with pytest.raises(ValueError, match='resume="ignore:mode,epochs,tail,step" if'):
        check_same(stored, seen, ("mode", "epochs"), "run")


def test_what_is_ignored_may_differ():
    check_same({"data": {"rows": 1}}, {"data": {"rows": 2}}, ("data",), "run")


def test_a_leaf_too_many_is_named():
    with pytest.raises(ValueError, match=r"state.params\['v'\] float32.* where nothing is stored"):
        check_same({"state": {}}, {"state": {".params['v']": "float32[2] aa"}}, (), "run")


@pytest.mark.parametrize(("field", "named"), [("state", 3), ("versions", 8)])
def test_many_differences_are_counted(field, named):
    seen = {field: {f"[{place}]": "aa" for place in range(20)}, "tail": "pad"}
    stored = {field: {f"[{place}]": "bb" for place in range(20)}, "tail": "drop"}
    with pytest.raises(ValueError, match=rf"and {20 - named} more, tail|tail .* and") as caught:
        check_same(stored, seen, (), "run")
    assert str(caught.value).count("is stored") == named + 1


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ("int32[] 40", r"a state that has trained since (step 40 where 7 is stored)"),
        ("int32[] 0", r"a state that has trained less (step 0 where 7 is stored)"),
        ("int32[2] 67ab", "a state of another step"),
    ],
)
@pytest.mark.parametrize("path", [".step", "[0].step"])
def test_a_state_that_has_trained_since_is_told_in_words_first(seen, words, path):
    stored = {"batch_size": 4, "state": {".params": "float32[] aa", path: "int32[] 7"}}
    found = {"batch_size": 8, "state": {".params": "float32[] bb", path: seen}}
    with pytest.raises(ValueError, match="in a loop of epochs one for each") as caught:
        check_same(stored, found, (), "run")
    assert str(caught.value).startswith(f"run: saw {words}, batch_size 8 where 4 is stored, state")
    assert 'resume="ignore:batch_size,state"' in str(caught.value)


@pytest.mark.parametrize("place", [0, 1, 2**16])
def test_one_changed_value_changes_the_digest_of_its_leaf_only(place):
    one = {"w": np.zeros(2**16 + 1, np.float32), "b": np.ones(3)}
    other = {"w": one["w"].copy(), "b": one["b"]}
    other["w"][place] = 1e-30
    before, after = digest_leaves(one), digest_leaves(other)
    assert before["['w']"] != after["['w']"]
    assert before["['b']"] == after["['b']"]


def test_digests_do_not_depend_on_where_leaves_lie():
    leaf = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert digest_leaves(leaf) == digest_leaves(jax.device_put(leaf, jax.devices()[2]))
    assert digest_leaves(leaf) == digest_leaves(leaf.T.copy().T)


def test_large_trees_are_sampled_to_their_ends(monkeypatch):
    monkeypatch.setattr(identity, "FULL", 2**20)
    monkeypatch.setattr(identity, "SAMPLED", 2**21)
    leaf = np.zeros(2**22, np.uint8)
    ends = [leaf.copy(), leaf.copy()]
    ends[0][0], ends[1][-1] = 1, 1
    digests = [digest_leaves(each)[""] for each in (leaf, *ends)]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("extent", "size", "tells"),
    [
        ("full", 2**22, True),
        ("auto", 2**22, False),
        ("auto", 2**21, True),
        ("sampled", 2**21, False),
        ("sampled", 2**20, True),
    ],
)
def test_how_much_of_a_tree_is_digested(extent, size, tells, monkeypatch):
    monkeypatch.setattr(identity, "FULL", 2**21)
    monkeypatch.setattr(identity, "SAMPLED", 2**20)
    monkeypatch.setattr(identity, "_PIECE", 2**18)
    leaf = np.zeros(size, np.uint8)
    other = leaf.copy()
    other[2**18 + 5] = 1
    assert (digest_leaves(leaf, extent) != digest_leaves(other, extent)) == tells


# Every field, in a run that goes on.

TRAINER = jh.trainer(lambda w, x: ((x * w).sum(axis=1) - 1) ** 2, optax.sgd(0.01), batch_size=16)
STATE = TRAINER.init(np.float32(1), key=jax.random.key(0))
# Six pieces of what a digest reads at once.
ROWS = np.zeros((6 * 2**18, 1), np.float32)


def train(folder, rows=ROWS[:64], **options):
    kept = jh.checkpoint(folder, **options)
    return TRAINER.train_from_host(STATE, rows, macrobatch_size=32, checkpoint=kept)


@pytest.fixture
def kept(tmp_path):
    train(tmp_path / "kept")
    return tmp_path / "kept"


# Only a fit has metrics and a controller.
OF_A_RUN = [field for field in FIELDS if field not in ("metrics", "controller")]


@pytest.mark.parametrize("field", OF_A_RUN)
def test_a_run_that_was_stored_with_another_value_is_refused_by_its_field(field, kept):
    """Another device for one, which a test has no other way to come by."""
    [commit] = kept.glob("commit-*")
    path = commit / files.MANIFEST
    manifest = files.read_manifest(path)
    assert manifest is not None
    assert field in manifest["content"]["identity"]
    manifest["content"]["identity"][field] = "another"
    files.write_manifest(path, manifest)
    plans = TRAINER.program.plans.stats()
    with pytest.raises(ValueError, match=rf"saw {field}.* where .* is stored") as caught:
        train(kept)
    assert f'resume="ignore:{field}"' in str(caught.value)
    assert TRAINER.program.plans.stats().compiles == plans.compiles
    train(kept, resume=f"ignore:{field}")


def test_the_fields_are_all_that_a_run_is_stored_with(kept):
    [commit] = commits_in(kept)
    assert sorted(commit.content["identity"]) == sorted(OF_A_RUN)


@pytest.mark.parametrize("place", [0, 3 * 2**18 + 5, 6 * 2**18 - 1])
def test_one_changed_value_is_refused_where_all_is_digested(place, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "FULL", 2**20)
    monkeypatch.setattr(identity, "SAMPLED", 2**21)
    calc = jh.calculator(lambda params, x: x.sum(axis=1) * params, batch_size=2**18, mode="loop")

    def run(rows, extent):
        folder = tmp_path / extent
        folder.mkdir(exist_ok=True)
        kept = jh.checkpoint(folder / "kept", fingerprint=extent, every="1h")
        options = {"macrobatch_size": 2**18, "out": folder / "out.npy", "checkpoint": kept}
        return calc.calc_from_host(np.float32(1), rows, **options)

    changed = ROWS.copy()
    changed[place] = 1e-30
    run(ROWS, "full")
    with pytest.raises(ValueError, match=r"saw data float32\[N, 1\] \w+ where float32\[N, 1\]"):
        run(changed, "full")
    # Of larger data, pieces are digested unless told otherwise; the first and the last among them.
    run(ROWS, "auto")
    if place in (0, len(ROWS) - 1):
        with pytest.raises(ValueError, match="saw data float32"):
            run(changed, "auto")
    else:
        run(changed, "auto")


@pytest.mark.parametrize("extent", ["full", "auto"])
def test_one_changed_value_of_large_parameters_is_refused_where_all_is_digested(
    extent, tmp_path, monkeypatch
):
    monkeypatch.setattr(identity, "FULL", 2**20)
    monkeypatch.setattr(identity, "SAMPLED", 2**21)
    calc = jh.calculator(lambda params, x: x.sum(axis=1) * params[0], batch_size=32)
    params = np.ones(6 * 2**18, np.float32)
    changed = params.copy()
    changed[2 * 2**18] = 2

    def run(params):
        kept = jh.checkpoint(tmp_path / "kept", fingerprint=extent)
        return calc.calc_from_host(params, ROWS[:64], out=tmp_path / "out.npy", checkpoint=kept)

    run(params)
    if extent == "auto":
        run(changed)
        return
    with pytest.raises(ValueError, match=r"saw params float32\[1572864\] \w+ where float32"):
        run(changed)


def test_another_processor_is_refused(kept, monkeypatch):
    monkeypatch.setattr(identity, "processor", lambda: ["flags: avx9", "model name\t: Other 1"])
    with pytest.raises(ValueError, match="saw device cpu cpu, Other 1, instructions .* where"):
        train(kept)
    _, info = train(kept, resume="ignore:device")
    assert info.report.rows == 0


def test_a_processor_of_other_instructions_is_another(monkeypatch):
    texts = set()
    for lines in (["flags: avx", "model name: A"], ["flags: avx9", "model name: A"], ["arm64", ""]):
        monkeypatch.setattr(identity, "processor", lambda lines=lines: lines)
        texts.add(identity.device_text(jax.devices()[0]))
    assert len(texts) == 3
