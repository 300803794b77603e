"""Which examples are held out: the plain algorithm on lists, and the one on arrays that large data needs."""

import random

import numpy as np
import pytest

from utils.data.examples import store_examples
from utils.data.records import Pair
from utils.data.split import split_examples
from utils.errors import UserError


def plain_split(keys, eval_rows, seed, keeps_duplicates):
    """Indices to train on, and those held out."""
    groups = {}
    for index, key in enumerate(keys):
        if keeps_duplicates or key not in groups:
            groups.setdefault(key, []).append(index)
    groups = list(groups.values())
    random.Random(seed).shuffle(groups)
    held_out = []
    while len(held_out) < eval_rows:
        held_out += groups.pop(0)
    return [index for group in groups for index in group], held_out


def stored(keys, tmp_path):
    return store_examples((Pair(f"f:{i}", f"prompt {key}", "r") for i, key in enumerate(keys)), tmp_path / "e.arrow")


@pytest.mark.parametrize("keeps_duplicates", [True, False])
@pytest.mark.parametrize("different", [5, 400, 10**9])
def test_split_is_that_of_the_plain_algorithm(tmp_path, keeps_duplicates, different):
    keys = [random.Random(7 * i).randrange(different) for i in range(2500)]
    examples = stored(keys, tmp_path)
    for seed, eval_rows in ((0, 1), (1, 3), (2, 40)):
        if not keeps_duplicates and eval_rows >= different:
            continue
        split = split_examples(examples.digests, eval_rows, seed, keeps_duplicates=keeps_duplicates)
        training, held_out = plain_split(keys, eval_rows, seed, keeps_duplicates)
        assert split.training.tolist() == training
        assert split.held_out.tolist() == held_out
        assert split.duplicates == (0 if keeps_duplicates else len(keys) - len(set(keys)))


@pytest.mark.parametrize("keeps_duplicates", [True, False])
def test_examples_that_are_held_out_by_name_are_not_trained_on(tmp_path, keeps_duplicates):
    digests = stored(["a", "b", "a", "c", "b", "d", "c", "d"], tmp_path).digests
    split = split_examples(digests, None, 0, keeps_duplicates=keeps_duplicates, held_out=3)
    assert split.held_out.tolist() == ([0, 1, 2] if keeps_duplicates else [0, 1])
    assert sorted(split.training.tolist()) == ([3, 5, 6, 7] if keeps_duplicates else [3, 5])
    assert split.duplicates == (1 if keeps_duplicates else 4)
    with pytest.raises(UserError, match=r"data\.eval_files: all rows of the source are equal to rows of these files"):
        split_examples(digests, None, 0, keeps_duplicates=keeps_duplicates, held_out=6)


def test_equal_pairs_are_equal_whatever_their_place(tmp_path):
    digests = stored(["a", "b", "a"], tmp_path).digests
    assert (digests[0] == digests[2]).all()
    assert (digests[0] != digests[1]).any()


def test_share_that_leaves_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.eval_rows: 2 rows are requested, but the data has only 2"):
        split_examples(stored("ab", tmp_path).digests, 2, 0, keeps_duplicates=False)
    with pytest.raises(
        UserError, match=r"with 1 rows held out, none are left for training, because equal rows stay together"
    ):
        split_examples(stored("aaa", tmp_path).digests, 1, 0, keeps_duplicates=True)
    assert len(split_examples(np.arange(8, dtype=np.uint64).reshape(4, 2), None, 0, keeps_duplicates=False).held_out)
