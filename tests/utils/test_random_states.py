"""The random states of a checkpoint: those of GPUs too, where there are some."""

import torch

from utils.training.checkpoint.random_states import random_states, restore_random_states


class Gpus:
    """Generators of GPUs, as torch.cuda gives access to them."""

    def __init__(self, monkeypatch, states):
        self.states = [torch.tensor(state, dtype=torch.uint8) for state in states]
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(self.states))
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device=0: self.states[device].clone())
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [state.clone() for state in self.states])
        monkeypatch.setattr(torch.cuda, "set_rng_state", self.set)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)

    def set(self, state, device=0):
        self.states[device] = state.clone()


def test_states_of_all_gpus_come_back(monkeypatch):
    gpus = Gpus(monkeypatch, [[1, 2], [3, 4]])
    saved = random_states()
    gpus.states = [torch.zeros(2, dtype=torch.uint8)] * 2
    restore_random_states(saved)
    assert [state.tolist() for state in gpus.states] == [[1, 2], [3, 4]]


def test_fewer_gpus_get_the_states_of_the_first_ones(monkeypatch):
    gpus = Gpus(monkeypatch, [[1, 2], [3, 4]])
    saved = random_states()
    gpus.states = gpus.states[:1]
    gpus.states[0] = torch.zeros(2, dtype=torch.uint8)
    restore_random_states(saved)
    assert gpus.states[0].tolist() == [1, 2]


def test_a_checkpoint_of_a_cpu_leaves_gpus_as_they_are(monkeypatch):
    saved = random_states()
    assert saved["cuda"] == []
    gpus = Gpus(monkeypatch, [[5, 6]])
    restore_random_states(saved)
    restore_random_states({name: state for name, state in saved.items() if name != "cuda"})
    assert gpus.states[0].tolist() == [5, 6]


def test_a_checkpoint_of_a_gpu_is_read_without_one(monkeypatch):
    with monkeypatch.context() as with_gpu:
        Gpus(with_gpu, [[1, 2]])
        saved = random_states()
    before = torch.get_rng_state()
    torch.rand(1)
    restore_random_states(saved)
    assert torch.equal(torch.get_rng_state(), before)
