"""Generators that a script makes without a seed draw on every worker what they draw on the first."""

import random
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from moreh.patches.several_workers.fresh_seeds import uninstall_fresh_seeds
from moreh.runtime.launch.randomness.fresh_seeds import agree_on_fresh_seeds

DRAWS = {
    "default_rng": lambda: np.random.default_rng().random(),
    "RandomState": lambda: np.random.RandomState().rand(),
    "Generator": lambda: np.random.Generator(np.random.PCG64()).random(),
    "numpy.seed": lambda: (np.random.set_state(STATE), np.random.seed(), np.random.rand())[2],
    "Random": lambda: random.Random().random(),
    "random.seed": lambda: (random.seed(), random.random())[1],
    "torch.seed": lambda: (torch.seed(), torch.rand(1).item()),
    "torch.random.seed": lambda: (torch.random.seed(), torch.rand(1).item()),
}
STATE = np.random.RandomState(0).get_state()


@pytest.fixture(autouse=True)
def generators_as_before():
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.fixture
def on_worker():
    """What a function returns on a worker; `root` is the run's."""

    def run(function, root=b"run"):
        agree_on_fresh_seeds(root)
        try:
            return function()
        finally:
            uninstall_fresh_seeds()

    return run


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_workers_draw_the_same_and_never_twice(on_worker, draw):
    def draws():
        return [draw() for _ in range(3)]

    first = on_worker(draws)
    assert on_worker(draws) == first
    assert len(set(first)) == 3
    assert not set(first) & set(on_worker(draws, root=b"another run"))
    assert draws() != first


def test_line_that_one_worker_alone_reaches_changes_nothing(on_worker):
    def draws(rank):
        if rank == 0:
            np.random.default_rng()
        return DRAWS["default_rng"]()

    assert on_worker(lambda: draws(0)) == on_worker(lambda: draws(1))


def test_seed_of_the_script_is_kept(on_worker):
    def draws():
        random.seed(3)
        drawn = [random.random(), random.Random(3).random(), random.Random(b"3").random()]
        return [*drawn, np.random.default_rng(3).random()]

    assert on_worker(draws) == draws()


def test_names_of_temporary_files_differ(on_worker):
    def names():
        tempfile._name_sequence = None
        return [next(tempfile._get_candidate_names()) for _ in range(3)]

    assert not set(on_worker(names)) & set(on_worker(names))


def drawn_in_process(_):
    return DRAWS["default_rng"]()


def test_processes_of_a_script_differ(on_worker):
    """Each has a copy of the worker's counts."""

    def draws():
        drawn = []
        for _ in range(2):
            with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
                drawn += pool.map(drawn_in_process, range(1))
        return drawn

    assert len(set(on_worker(draws))) == 2


class Drawn(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return DRAWS["default_rng"]()


def test_processes_of_a_loader_differ_and_agree_with_those_of_other_workers(on_worker):
    def draws():
        torch.manual_seed(1)
        return torch.cat(list(torch.utils.data.DataLoader(Drawn(), num_workers=2))).tolist()

    first = on_worker(draws)
    assert len(set(first)) == 4
    assert on_worker(draws) == first
