"""Arrays that share memory with tensors are known for as long as they exist."""

import numpy as np
import pytest
import torch
from torch import nn

from moreh.errors import OptionError
from moreh.patches.several_workers.numpy_arrays import forget_arrays, known_arrays, note_arrays
from moreh.runtime.engine.sharded.earlier_aliases import check_arrays


@pytest.fixture(autouse=True)
def noting():
    note_arrays()
    yield
    forget_arrays()


def parameters():
    return {"first": nn.Parameter(torch.ones(4, 2)), "second": nn.Parameter(torch.ones(4, 2))}


def test_arrays_are_known_while_they_exist():
    tensor = torch.ones(3)
    kept, of_numpy = tensor.numpy(), np.asarray(tensor)
    tensor.numpy()
    assert {id(array) for array in known_arrays()} == {id(kept), id(of_numpy)}
    del kept, of_numpy
    assert not list(known_arrays())


@pytest.mark.parametrize("view", [lambda a: a, lambda a: a[::-1], lambda a: a[3:, 1:], lambda a: a.T])
def test_view_of_a_parameter_is_refused(view):
    weights = parameters()
    kept = [view(weights["second"].detach().numpy())]
    with pytest.raises(OptionError, match=r"shares memory with second.*\.numpy\(\)\.copy\(\)"):
        check_arrays(weights)
    kept.clear()
    check_arrays(weights)


def test_parameters_may_lie_inside_of_one_another():
    whole = torch.ones(100)
    weights = {"whole": nn.Parameter(whole), "start": nn.Parameter(whole[10:20]), "other": nn.Parameter(torch.ones(9))}
    assert weights["start"].data_ptr() == whole[10:].data_ptr()
    kept = [whole[60:70].numpy()]
    with pytest.raises(OptionError, match="shares memory with whole"):
        check_arrays(weights)
    assert len(kept) == 1


def test_copies_and_arrays_of_others_are_allowed():
    weights, other = parameters(), torch.ones(4)
    kept = [weights["first"].detach().numpy().copy(), other.numpy(), torch.ones(0).numpy()]
    check_arrays(weights)
    check_arrays({"on meta": nn.Parameter(torch.ones(2, device="meta"))})
    assert len(kept) == 3
