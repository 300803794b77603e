"""Moving tensors and modules means what it means with a GPU: what is copied, what is shared, what stays ordinary."""

import copy
import functools
import pickle

import numpy as np
import pytest
import torch

from moreh.accelerator.job import local_job


def on_device(tensor):
    return local_job().ledger.holds(tensor)


def test_moving_copies_and_staying_does_not():
    host = torch.ones(3)
    moved = host.cuda()
    moved.zero_()
    assert host.tolist() == [1, 1, 1]  # a real GPU has a memory of its own
    assert moved.cuda() is moved
    assert moved.to("cuda:0") is moved
    back = moved.cpu()
    back.fill_(5)
    assert moved.tolist() == [0, 0, 0]
    assert moved.to("cpu") is not moved
    assert torch.as_tensor(host, device="cuda") is not host


def test_snapshot_of_parameters_does_not_follow_training():
    model = torch.nn.Linear(2, 2).cuda()
    snapshot = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(snapshot["weight"] + 1, model.weight)


def test_gradients_flow_through_a_move():
    leaf = torch.ones(2, requires_grad=True)
    (leaf.cuda() * 3).sum().backward()
    assert leaf.grad.tolist() == [3, 3]


def test_modules_keep_ties_and_identity():
    model = torch.nn.Sequential(torch.nn.Embedding(4, 2), torch.nn.Linear(2, 4, bias=False))
    model[1].weight = model[0].weight
    weight = model[0].weight
    assert model.cuda() is model
    assert model[0].weight is weight
    assert model[1].weight is weight
    assert model.to("cuda", torch.float64)[0].weight.dtype == torch.float64
    assert on_device(model[0].weight)


@pytest.mark.parametrize("change", [lambda m: m.bfloat16(), lambda m: m.double(), copy.deepcopy])
@pytest.mark.parametrize("leave", [lambda t: t.cpu(), lambda t: t.to("cpu"), lambda t: t.to(torch.device("cpu"))])
def test_snapshot_of_a_changed_model_does_not_follow_training(change, leave):
    model = change(torch.nn.Linear(2, 2).cuda())
    snapshot = leave(model.weight.detach())
    with torch.no_grad():
        model.weight.add_(1)
    assert not torch.equal(snapshot, model.weight)


def test_snapshot_of_a_gradient_and_of_a_result():
    model = torch.nn.Linear(2, 2).cuda()
    model(torch.ones(1, 2).cuda()).sum().backward()
    gradient = model.weight.grad.cpu()
    model.zero_grad(set_to_none=False)
    assert gradient.abs().sum() > 0
    result = torch.ones(3, device="cuda") * 2
    snapshot = result.cpu()
    result.add_(1)
    assert snapshot.tolist() == [2, 2, 2]


@pytest.mark.parametrize("leave", [lambda t: t.cpu(), lambda t: t.to("cpu"), lambda t: t.to(torch.device("cpu"))])
def test_leaf_that_is_not_on_the_device_is_returned_itself(leave):
    torch.ones(1).cuda()
    leaf, parameter = torch.ones(2, requires_grad=True), torch.nn.Parameter(torch.ones(2))
    assert leave(leaf) is leaf
    with torch.no_grad():
        assert leave(parameter) is parameter
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    assert leave(frozen) is frozen
    cast = torch.nn.Linear(2, 2).cuda().double()
    assert leave(cast.weight) is not cast.weight


NOTHING_ON_THE_DEVICE = """
import torch
torch.moreh.option.enable_advanced_parallelization()
model = torch.nn.Linear(2, 2)
model(torch.ones(1, 2)).sum().backward()
for tensor in (torch.ones(2), model.weight, model.weight.grad, model.state_dict()["weight"]):
    print(tensor.cpu() is tensor, tensor.to("cpu") is tensor)
"""


def test_nothing_is_copied_before_something_was_put_on_the_device(run_python_forked):
    finished = run_python_forked(NOTHING_ON_THE_DEVICE)
    assert finished.returncode == 0, finished.stderr
    assert [line for line in finished.stdout.splitlines() if not line.startswith("[")] == ["True True"] * 4


LOADED_BY_ACCELERATE = """
import torch
torch.moreh.option.enable_advanced_parallelization()
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from transformers import GPT2Config, GPT2LMHeadModel
config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8)
GPT2LMHeadModel(config).save_pretrained("model")
torch.ones(1).cuda()
with init_empty_weights():
    model = GPT2LMHeadModel(config)
model.tie_weights()
model = load_checkpoint_and_dispatch(model, "model/model.safetensors", device_map={"": "cpu"})
print(all(parameter.requires_grad for parameter in model.parameters()))


def losses_of(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.arange(32).view(4, 8) % 16
    losses = []
    for _ in range(3):
        loss = model.eval()(ids.cuda(), labels=ids.cuda()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def emptied(device):
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    model.to_empty(device=device)
    model.tie_weights()
    model.load_state_dict(GPT2LMHeadModel.from_pretrained("model").state_dict())
    return model


expected = losses_of(GPT2LMHeadModel.from_pretrained("model"))
print(expected[2] < expected[0], losses_of(model) == expected)
with torch.no_grad():
    moved = GPT2LMHeadModel.from_pretrained("model").cuda().cpu()
by_parts = GPT2LMHeadModel.from_pretrained("model")
by_parts.transformer.h[0].cuda()
by_parts.transformer.wte.to("cuda:0", non_blocking=True)
loaded = GPT2LMHeadModel.from_pretrained("model", low_cpu_mem_usage=True, device_map="auto")
cast = GPT2LMHeadModel.from_pretrained("model").float()
for other in (moved, by_parts, loaded, emptied("cpu"), emptied("cuda"), cast):
    print(losses_of(other) == expected)
"""


def test_model_that_was_filled_or_moved_by_another_way_trains_as_any_other(run_python_forked):
    pytest.importorskip("accelerate")
    finished = run_python_forked(LOADED_BY_ACCELERATE)
    assert finished.returncode == 0, finished.stderr
    printed = [line for line in finished.stdout.splitlines() if not line.startswith("[")]
    assert printed == ["True", "True True", *["True"] * 6]


def test_array_is_copied_to_the_device():
    array = np.ones(3, "f4")
    moved = [torch.as_tensor(array, device="cuda"), torch.asarray(array, device="cuda")]
    array[:] = 7
    assert [tensor.tolist() for tensor in moved] == [[1, 1, 1]] * 2


def test_tensor_moves_to_where_another_tensor_is():
    host, device = torch.ones(3), torch.zeros(1).cuda()
    moved = host.to(device)
    moved.zero_()
    assert host.tolist() == [1, 1, 1]
    assert on_device(moved)
    sparse = torch.eye(2).to_sparse()
    sparse.cuda().mul_(0)
    assert sparse.to_dense().sum() == 2


@pytest.mark.parametrize("arguments", [{"device": 0}, {"device": "cuda"}, {"tensor": None}])
def test_module_moves_by_keyword(arguments):
    if "tensor" in arguments:
        arguments = {"tensor": torch.zeros(1).cuda()}
    assert on_device(torch.nn.Linear(2, 2).to(**arguments).weight)


def test_lazy_module_is_moved():
    layer = torch.nn.LazyLinear(3).cuda()
    assert layer(torch.ones(1, 2).cuda()).shape == (1, 3)


def test_moved_model_is_an_ordinary_one(tmp_path, run):
    """Nothing of this package is in it: TorchScript takes it, and it loads where this package is not."""
    import sys

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()).cuda()
    inputs = torch.ones(1, 2)
    assert torch.equal(torch.jit.script(model)(inputs), model(inputs))
    torch.save(model, tmp_path / "model.pt")
    source = (
        "import sys, torch; torch.load(sys.argv[1], weights_only=False); assert 'moreh' not in sys.modules; "
        "print('loaded')"
    )
    finished = run(sys.executable, "-c", source, tmp_path / "model.pt", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert finished.stdout == "loaded\n", finished.stderr


def make_zeros(n: int):
    return torch.zeros(n) + torch.arange(n) + torch.full([n], 1.0)


def test_torchscript_knows_the_replaced_functions():
    assert torch.jit.script(make_zeros)(3).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "function", [torch.zeros, torch.tensor, torch.load, torch.Tensor.to, torch.Tensor.new_zeros, torch.fft.fftfreq]
)
def test_replaced_functions_can_be_pickled(function):
    assert pickle.loads(pickle.dumps(function)) is function
    assert pickle.loads(pickle.dumps(functools.partial(function, 1))).func is function


def test_tensor_class_of_its_own_is_asked():
    asked = []

    class Counted(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            asked.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    torch.zeros_like(torch.ones(2).as_subclass(Counted))
    assert torch.zeros_like in asked


def test_functional_transforms_work_with_tensors_on_the_device():
    layer = torch.nn.Linear(3, 1).cuda()
    inputs = torch.ones(4, 3).cuda()
    assert torch.func.vmap(layer)(inputs).shape == (4, 1)
    assert torch.func.jacrev(layer)(inputs).shape == (4, 1, 4, 3)
    parameters = dict(layer.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(layer, p, inputs).sum())(parameters)
    assert gradients["weight"].tolist() == [[4, 4, 4]]
    assert torch.func.grad(lambda x: (x.cuda() * 2).sum().cpu())(torch.ones(2)).tolist() == [2, 2]


def test_normal_and_pinned_tensors_are_created():
    assert on_device(torch.normal(0.0, 1.0, (2,), device="cuda"))
    assert torch.zeros(3, pin_memory=True).tolist() == [0, 0, 0]


def test_random_state_of_the_device_is_that_of_the_cpu():
    torch.cuda.manual_seed_all(3)
    first = torch.randn(3, device="cuda")
    state = torch.cuda.get_rng_state_all()
    second = torch.randn(3, device="cuda")
    torch.cuda.manual_seed(3)
    assert torch.equal(torch.randn(3, device="cuda"), first)
    torch.cuda.set_rng_state_all(state)
    assert torch.equal(torch.randn(3, device="cuda"), second)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.rand(1)


def test_device_guard_and_aliases_in_torch_cuda_memory():
    with torch.cuda.device(torch.device("cuda")):
        pass
    assert torch.cuda.get_device_capability() == (9, 0)
    assert torch.cuda.memory.memory_allocated() == torch.cuda.memory_allocated()


def test_allocation_that_the_machine_cannot_make_is_an_out_of_memory_error(monkeypatch):
    monkeypatch.setattr(type(local_job()), "capacity_bytes", 1 << 60)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="This machine is out of memory"):
        torch.zeros(1 << 50, device="cuda")
