"""Identities: what differs is named, and nothing else."""

import jax
import numpy as np
import pytest

from jaxhandler.checkpointing import identity
from jaxhandler.checkpointing.identity import check_same, digest_leaves


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


def test_what_is_ignored_may_differ():
    check_same({"data": {"rows": 1}}, {"data": {"rows": 2}}, ("data",), "run")


def test_a_leaf_too_many_is_named():
    with pytest.raises(ValueError, match=r"state.params\['v'\] float32.* where nothing is stored"):
        check_same({"state": {}}, {"state": {".params['v']": "float32[2] aa"}}, (), "run")


def test_many_differences_are_counted():
    seen = {"state": {f"[{place}]": "aa" for place in range(20)}}
    with pytest.raises(ValueError, match="and 13 more"):
        check_same({}, seen, (), "run")


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
