"""The hook on one worker: what it adds to a model changes no loss and no gradient, and it says what it does."""

import re

import pytest

from tests.helpers.compare import curve_difference


@pytest.fixture
def run(run_forked):
    return run_forked


# Trains three ways in one process and prints the losses, each as a line of numbers.
COMPARE = """
import sys, torch
from transformers import GPT2Config, GPT2LMHeadModel

def losses(before_step=None):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0,
                                       eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).cuda()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)  # AdamW would not see a gradient of another length
    ids = torch.arange(64).repeat(8).reshape(16, 32).cuda()
    curve = []
    torch.manual_seed(1)
    for _ in range(5):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        if before_step is not None:
            before_step(model)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    peak = torch.cuda.max_memory_allocated()
    model.eval()
    with torch.no_grad():
        curve.append(model(ids, labels=ids).loss.item())
    print(model(ids).logits.dtype, peak)
    return curve

def break_one_gradient(model):
    model.transformer.h[1].mlp.c_fc.weight.grad.mul_(1.01)

print(losses())
print(losses(break_one_gradient))
torch.moreh.option.enable_advanced_parallelization(**eval(sys.argv[1]))
torch.cuda.reset_peak_memory_stats()
print(losses())
"""


def compare(run_python, options):
    """The losses of the plain loop, with one gradient slightly wrong, and under the hook; memory peaks; the console."""
    finished = run_python(COMPARE, repr(options))
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    curves = [line for line in lines if line.startswith("[") and not line.startswith("[info]")]
    plain, broken, hooked = (eval(curve, {"nan": float("nan")}) for curve in curves)
    peaks = [int(line.split()[1]) for line in lines if line.startswith("torch.")]
    return plain, broken, hooked, peaks, finished.stdout


def test_float32_gives_the_losses_of_the_plain_loop(run_python):
    hooked_peaks = {}
    for recompute in (False, True):
        options = {"mixed_precision": False, "activation_recomputation": recompute}
        plain, broken, hooked, peaks, console = compare(run_python, options)
        assert curve_difference(hooked, plain) < 1e-6
        assert curve_difference(broken, plain) > 1e-6  # so the comparison sees an error of 1 % in one of 38 gradients
        assert f"recomputation : {'full' if recompute else 'none'}; predicted: " in console  # on this machine
        chosen = re.search(r"recomputation : (\w+)\(\d\), distribute_param", console)[1]  # on the accelerator
        assert (chosen != "none") == recompute
        hooked_peaks[recompute] = peaks[2]
    assert hooked_peaks[True] < hooked_peaks[False]  # it was really active


def test_bfloat16_gives_nearly_the_losses_of_the_plain_loop(run_python):
    plain, _, hooked, _, console = compare(run_python, {})
    assert curve_difference(hooked, plain) < 0.02
    computed_in_bfloat16 = "mixed_precision : bfloat16" in console
    assert computed_in_bfloat16 != ("mixed_precision : off, float32" in console)
    assert (curve_difference(hooked, plain) > 1e-6) == computed_in_bfloat16


def test_console_has_the_log_lines_of_the_platform(run_python, tmp_path):
    *_, console = compare(run_python, {"mixed_precision": False})
    logged = [line.removeprefix("[info] ") for line in console.splitlines() if line.startswith("[info] ")]
    patterns = [
        r"MoAI Accelerator is ready to use\.",
        r"Moreh Version: .+",
        r"Moreh Job ID: 1",
        r"Simulated: this machine has no GPU, so xLarge\.512GB .+",
        r"The number of candidates is (\d+)\.",
        r"Parallel Graph Compile start\.\.\.",
        r"Elapsed Time to compile all candidates = \d+ \[ms\]",
        r"Parallel Graph Compile finished\.",
        r"The number of possible candidates is (\d+)\.",
        r"SelectBestGraphFromCandidates start\.\.\.",
        r"Elapsed Time to compute cost for survived candidates = \d+ \[ms\]",
        r"SelectBestGraphFromCandidates finished\.",
        r"Configuration for parallelism is selected\.",
        r"num_stages : \d+, num_micro_batches : \d+, batch_per_device : \d+, (No TP|TP \d+), "
        r"recomputation : (none\(0\)|selective\(1\)|full\(2\)), distribute_param : (true|false), "
        r"distribute_low_prec_param : false",
        r"train: true",
        r"Simulated: on xLarge\.512GB \(8 x MI250 GCD\) the plan '.+' is predicted to take .+",
        r"This machine: 1 worker, micro-batches of at most [\d,]+ tokens, recomputation : none; predicted: .+",
        r"Optimizations : all",
    ]
    assert len(logged) == len(patterns)  # once for each model, and one of the two was trained under the hook
    matches = [re.fullmatch(pattern, line) for pattern, line in zip(patterns, logged, strict=True)]
    assert all(matches), logged
    assert int(matches[4][1]) >= int(matches[8][1]) > 0
    assert (tmp_path / "advanced_parallelization_selected_config.dump").read_text() == logged[13] + "\n"


def test_machine_without_bfloat16_units_computes_in_float32(run_python):
    source = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
import moreh.runtime.kernels.precision as precision
precision.bfloat16_speedup = lambda device: 0.4
torch.moreh.option.enable_advanced_parallelization()
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)).cuda()
print(model(torch.zeros(1, 4, dtype=torch.long).cuda()).logits.dtype)
"""
    console = run_python(source).stdout
    assert "[info] mixed_precision : off, float32 (bfloat16 matmuls are 0.4 x as fast as float32 here)" in console
    assert "torch.float32" in console


def test_model_that_cannot_recompute_is_refused(run_python):
    source = (
        "import torch\n"
        "torch.moreh.option.enable_advanced_parallelization(activation_recomputation=True)\n"
        "model = torch.nn.Sequential(torch.nn.Linear(2, 2))\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        model(torch.ones(1, 2))\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    assert (
        run_python(source).stdout.count("Sequential is not a transformers model, so it has no layers to recompute") == 2
    )


INTERRUPTED = """
import os, signal, sys, torch
if len(sys.argv) > 1:
    torch.moreh.option.enable_advanced_parallelization()

class Interrupted(torch.nn.Linear):
    def forward(self, x):
        if x.shape[0] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return super().forward(x)

model = torch.nn.Sequential(Interrupted(4, 4)).cuda()
model(torch.ones(2, 4).cuda())
try:
    model(torch.ones(3, 4).cuda())
except KeyboardInterrupt:
    print("interrupted")
print((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
print(torch._C._autograd._top_saved_tensors_default_hooks(True))
"""


@pytest.mark.parametrize("hook", [[], ["hook"]])
def test_interrupt_in_a_forward_pass_leaves_nothing_switched_on(run_python, hook):
    assert run_python(INTERRUPTED, *hook).stdout.endswith("interrupted\ntorch.float32\nNone\n")


OTHER_PRECISIONS = """
import torch
import moreh.runtime.kernels.precision as precision
precision.bfloat16_speedup = lambda device: 2.0
torch.moreh.option.enable_advanced_parallelization()
inputs = torch.ones(2, 4)
layers = lambda: torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)).cuda()
def show(outputs):
    rounded = outputs.dtype == torch.float32 and torch.equal(outputs, outputs.bfloat16().float())
    print(outputs.dtype, "from bfloat16" if rounded else "")
show(layers()(inputs))
with torch.autocast("cuda", enabled=False):
    show(layers()(inputs))
with torch.autocast("cuda", dtype=torch.float16):
    show(layers()(inputs))
show(layers().double()(inputs.double()))
show(layers().half()(inputs.half()))
compiled = torch.compile(layers(), backend="aot_eager", fullgraph=True)
show(compiled(inputs))
"""


def test_precision_that_the_script_chose_is_kept(run_python):
    """Outputs are float32 where the weights are: what the script computes of them is not rounded."""
    finished = run_python(OTHER_PRECISIONS)
    dtypes = [line.removeprefix("torch.").strip() for line in finished.stdout.splitlines() if line.startswith("torch.")]
    half = "float32 from bfloat16"
    assert dtypes == [half, "float32", "float16", "float64", "float16", half], finished.stderr


def test_parts_of_a_model_can_be_called_by_themselves(run_python):
    source = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
torch.moreh.option.enable_advanced_parallelization(activation_recomputation=True, mixed_precision=False)
model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64)).cuda().train()
ids = torch.zeros(1, 4, dtype=torch.long)
model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False).logits.sum().backward()
print(model.is_gradient_checkpointing)
"""
    assert run_python(source).stdout.endswith("True\n")


SMALL = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from moreh.runtime.engine import fast_path, hook
calls = []
call = fast_path.FastPath.call
fast_path.FastPath.call = lambda *args: calls.append(args) or call(*args)
torch.moreh.option.enable_advanced_parallelization(mixed_precision=False)
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=32)).eval()
flops_per_token = 6 * sum(parameter.numel() for parameter in model.parameters())
ids = torch.arange(64).view(4, 16)
for tokens in (64, 65):
    hook.MIN_FLOPS = tokens * flops_per_token
    loss = model(ids, labels=ids).loss
    loss.backward()
    print("calls", len(calls), "loss", loss.item(), "norm", model.lm_head.weight.grad.norm().item())
    model.zero_grad()
"""


def test_batch_too_small_to_gain_is_left_to_the_models_own_forward(run_python):
    finished = run_python(SMALL)
    assert finished.returncode == 0, finished.stderr
    lines = [line.split() for line in finished.stdout.splitlines() if line.startswith("calls")]
    assert [line[1] for line in lines] == ["1", "1"]
    assert curve_difference(*([float(line[3]), float(line[5])] for line in lines)) < 1e-6
    assert "too small to benefit" not in finished.stdout  # when it was planned, it was not


def test_lazy_module_gets_its_parameters_in_its_first_call(run_python):
    finished = run_python(
        "import torch\n"
        "torch.moreh.option.enable_advanced_parallelization(mixed_precision=False)\n"
        "model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.Linear(3, 2))\n"
        "print(model(torch.ones(2, 5)).shape)\n"
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.endswith("torch.Size([2, 2])\n")


# Two steps, of which the second is left to the model's own forward pass; in each, the state of the allocator.
LEFT_AFTER_A_STEP = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from moreh.runtime.engine import hook
from moreh.runtime.kernels import allocator

hook.MIN_FLOPS = 0
torch.moreh.option.enable_advanced_parallelization(mixed_precision=False, disable=sys.argv[1:])
config = LlamaConfig(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=1, vocab_size=32)
model, ids = LlamaForCausalLM(config), torch.arange(32).reshape(2, 16)
for step in range(2):
    model(input_ids=ids, labels=ids).loss.backward()
    print("state:", allocator._state)
    model.lm_head.weight.register_hook(print)
"""


@pytest.mark.parametrize(
    ("disabled", "states"),
    [((), ["after first step", "own forward"]), (("keep_freed_memory",), ["unchanged", "unchanged"])],
)
def test_model_that_leaves_the_fast_path_after_a_step_keeps_its_memory(run_python, disabled, states):
    finished = run_python(LEFT_AFTER_A_STEP, *disabled)
    assert finished.returncode == 0, finished.stderr
    assert re.findall("^state: (.*)$", finished.stdout, re.MULTILINE) == states
