"""The CUDA face: what a script calls works without a GPU and means what it means with one."""

import gc
import sys
import threading

import pytest
import torch
from torch.utils.data import DataLoader

from moreh.accelerator.job import local_job
from moreh.errors import AcceleratorError
from tests.helpers.scripts.tutorial import TUTORIAL, VOCABULARY_SIZE, save_tutorial_model


def on_device(tensor):
    return local_job().ledger.holds(tensor)


def test_torch_cuda_answers_for_the_accelerator():
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 1
    assert torch.cuda.current_device() == 0
    assert torch.cuda.get_device_name() == torch.cuda.get_device_name(0) == "MoAI Accelerator"
    assert torch.cuda.get_device_properties("cuda").total_memory == 65_520 * 2**20
    assert torch.cuda.is_bf16_supported()
    torch.cuda.set_device(0)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.manual_seed_all(1)
    torch.cuda.manual_seed(1)
    with torch.cuda.device(0):
        pass
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total == 65_520 * 2**20


def test_allocated_memory_follows_the_tensors_that_are_alive():
    gc.collect()  # garbage of other tests would be freed in between
    before = torch.cuda.memory_allocated()
    tensor = torch.zeros(1000, device="cuda")
    assert torch.cuda.memory_allocated() == before + 4000
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == before + 4000
    del tensor
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() == before + 4000
    assert torch.cuda.memory_reserved() == before


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda:0"), 0])
def test_device_is_meant_however_it_is_named(device):
    tensor = torch.ones(3)
    assert on_device(tensor.to(device))
    assert on_device(tensor.to(device=device))
    assert on_device(tensor.to(device, torch.float64))
    assert tensor.to(device, torch.float64).dtype == torch.float64
    assert on_device(tensor.cuda(device))
    assert on_device(torch.empty(3, device=device))
    assert on_device(next(torch.nn.Linear(2, 2).to(device).parameters()))


FACTORIES = {
    "arange": (4,),
    "as_tensor": ([1],),
    "asarray": ([1],),
    "bartlett_window": (4,),
    "blackman_window": (4,),
    "empty": (2, 3),
    "empty_like": (torch.ones(2),),
    "empty_permuted": ((2, 3), (0, 1)),
    "empty_strided": ((2, 3), (3, 1)),
    "eye": (3,),
    "full": ((2,), 7),
    "full_like": (torch.ones(2), 7),
    "hamming_window": (4,),
    "hann_window": (4,),
    "kaiser_window": (4,),
    "linspace": (0, 1, 5),
    "logspace": (0, 1, 5),
    "ones": (2,),
    "ones_like": (torch.ones(2),),
    "rand": (2,),
    "rand_like": (torch.ones(2),),
    "randint": (5, (2,)),
    "randint_like": (torch.ones(2), 5),
    "randn": (2,),
    "randn_like": (torch.ones(2),),
    "randperm": (5,),
    "scalar_tensor": (3.0,),
    "tensor": ([1, 2],),
    "tril_indices": (3, 3),
    "triu_indices": (3, 3),
    "zeros": (2,),
    "zeros_like": (torch.ones(2),),
    "sparse_coo_tensor": (torch.tensor([[0, 1]]), torch.ones(2), (3,)),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_factory_creates_its_tensor_on_the_device(name):
    tensor = getattr(torch, name)(*FACTORIES[name], device="cuda")
    assert tensor.layout != torch.strided or on_device(tensor)


def test_no_factory_of_torch_is_forgotten():
    """Every function for which `with torch.device(...)` works takes the device too."""
    from torch.utils._device import _device_constructors

    untouched = [f for f in _device_constructors() for m in (torch, torch.fft, torch.nested) if f in vars(m).values()]
    assert untouched == []


def test_methods_modules_and_contexts_create_on_the_device():
    source = torch.ones(2)
    made = {name: getattr(source, name) for name in ("new_empty", "new_ones", "new_zeros")}
    assert all(on_device(create(2, device="cuda")) for create in made.values())
    assert on_device(source.new_tensor([1], device="cuda"))
    assert on_device(source.new_full((2,), 3.0, device="cuda"))
    assert on_device(torch.fft.fftfreq(4, device="cuda"))
    assert torch.signal.windows.hann(4, device="cuda").shape == (4,)
    assert on_device(torch.nn.Embedding(4, 2, device="cuda").weight)
    with torch.device("cuda"):
        assert on_device(torch.zeros(2))
        assert not on_device(torch.zeros(2, device="cpu"))
    torch.set_default_device("cuda")
    try:
        assert on_device(torch.ones(2))
        assert on_device(torch.tensor([1.0]))
    finally:
        torch.set_default_device(None)
    assert not on_device(torch.ones(2))


def test_face_works_in_every_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(on_device(torch.zeros(1, device="cuda"))))
    thread.start()
    thread.join()
    assert results == [True]


def test_autocast_for_cuda_computes_in_its_dtype():
    layer = torch.nn.Linear(4, 4).cuda()
    inputs = torch.ones(2, 4).cuda()
    with torch.autocast("cuda"):
        assert layer(inputs).dtype == torch.bfloat16
    with torch.autocast("cuda", dtype=torch.float16):
        assert layer(inputs).dtype == torch.float16
    with torch.autocast(device_type="cuda", enabled=False):
        assert layer(inputs).dtype == torch.float32
    assert torch.ones(2).pin_memory().tolist() == [1, 1]


def test_pinned_memory_gives_no_warning(run_python_forked):
    source = (
        "import torch\n"
        "loader = torch.utils.data.DataLoader(torch.arange(8), batch_size=4, pin_memory=True)\n"
        "print([batch.cuda(non_blocking=True).sum().item() for batch in loader])\n"
    )
    finished = run_python_forked(source)
    assert finished.stdout.endswith("[6, 22]\n")
    assert "Warning" not in finished.stderr


def test_load_with_the_device_as_map_location(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "w.pt")
    for location in ("cuda", "cuda:0", torch.device("cuda")):
        assert torch.load(tmp_path / "w.pt", map_location=location)["weight"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "use", [lambda: torch.ones(1).to("cuda:1"), lambda: torch.ones(1).cuda(1), lambda: torch.zeros(1, device=1)]
)
def test_second_device_is_refused(use):
    with pytest.raises(AcceleratorError, match="no device cuda:1: a script sees one device"):
        use()


def test_children_of_a_job_belong_to_it(run_python_forked):
    source = (
        "import subprocess, sys, torch\n"
        "torch.zeros(1).cuda()\n"
        "if len(sys.argv) == 1:\n"
        "    sys.exit(subprocess.run([sys.executable, __file__, 'child']).returncode)\n"
    )
    assert run_python_forked(source).returncode == 0


def test_nothing_is_patched_with_a_real_gpu(run):
    source = (
        "import torch\n"
        "before = {name: getattr(torch.cuda, name) for name in dir(torch.cuda)}\n"
        "patched = lambda: (torch.zeros, torch.Tensor.to, torch.nn.Module.cuda, torch.autocast.__init__)\n"
        "originals = patched()\n"
        "torch.cuda.device_count = before['device_count'] = lambda: 1\n"
        "import moreh\n"
        "assert torch.moreh is moreh\n"
        "assert all(getattr(torch.cuda, name) is value for name, value in before.items())\n"
        "assert patched() == originals\n"
        "from moreh.patches import active\n"
        "own = ('torch.moreh', 'torch.version.moreh', 'torch.ops.moreh.')\n"
        "assert [patch.target for patch in active() if not patch.target.startswith(own)] == []\n"
        "print('untouched')"
    )
    assert run(sys.executable, "-c", source, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stdout == "untouched\n"


def test_import_torch_attaches_by_itself(run):
    assert run(sys.executable, "-c", "import torch; print(torch.moreh.option)").stdout.startswith(
        "<module 'moreh.option'"
    )


def test_libraries_that_probe_cuda_keep_their_cpu_paths(tmp_path):
    """Each library asks torch.cuda by itself; a wrong answer would lead it into functions that this build lacks."""
    import torch.utils.checkpoint
    import transformers

    assert not transformers.utils.is_torch_cuda_available()
    with torch.random.fork_rng():
        torch.rand(1)
    inputs = torch.ones(2, 4, requires_grad=True)
    layer = torch.nn.Linear(4, 4).cuda()
    torch.utils.checkpoint.checkpoint(layer, inputs.cuda(), use_reentrant=False).sum().backward()
    assert inputs.grad is not None
    loader = DataLoader(torch.arange(8), batch_size=4, num_workers=2)
    assert [batch.cuda().sum().item() for batch in loader] == [6, 22]
    with pytest.warns(UserWarning, match="GradScaler is enabled, but CUDA is not available"):
        scaler = torch.amp.GradScaler("cuda")
    assert scaler.scale(torch.ones(1)).item() == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x, layer: layer(x) + torch.ones(4, device="cuda"),
        lambda x, layer: layer(x.cuda()) + 1,
        lambda x, layer: layer(x.to("cuda")).cpu() + 1,
    ],
)
def test_torch_compile_works_under_the_face(function):
    layer = torch.nn.Linear(4, 4).cuda()
    inputs = torch.rand(2, 4)
    compiled = torch.compile(lambda x: function(x, layer), backend="aot_eager")
    assert torch.allclose(compiled(inputs), layer(inputs) + 1)


def test_tutorial_loop_runs_unchanged(run_forked, tmp_path, make_gpt2):
    """The tutorial's loop in a file that imports torch, transformers and copy, and knows of no other package."""
    save_tutorial_model(make_gpt2(vocab_size=VOCABULARY_SIZE), tmp_path / "model")
    script = tmp_path / "tutorial.py"
    script.write_text(TUTORIAL, encoding="utf-8")
    finished = run_forked(sys.executable, script, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    losses = [float(line.split()[1]) for line in finished.stdout.splitlines() if line.startswith("Loss:")]
    assert len(losses) == 50
    assert sum(losses[-10:]) < 0.7 * sum(losses[:5]) * 2
    assert (tmp_path / "finetuned" / "model.safetensors").exists()
    assert "[info] MoAI Accelerator is ready to use." in finished.stdout
