"""Names of the platform in scripts and the environment: they mean what they mean there, or a line says what to do."""

import pytest
import torch

from moreh.errors import OptionError
from moreh.version import __version__

SCRIPT = """
import torch
from moreh.driver.common.config import set_backend_config, set_config
set_config("name", 1)
set_backend_config("other", True)
torch.zeros(1).cuda()
from moreh.accelerator.job import local_job
print("accelerator", local_job().accelerator.index)
"""


@pytest.fixture
def run(run_forked):
    return run_forked


def test_version_is_where_the_platform_has_it():
    assert torch.version.moreh == __version__


@pytest.mark.parametrize(
    "name",
    ["torch.moreh.option.parallelizer_init", "torch.moreh.pipeline_assign", "torch.moreh.MixedPrecisionTrainer"],
)
def test_older_entry_points_name_the_line(name):
    owner, _, attribute = name.rpartition(".")
    owner = torch.moreh.option if owner.endswith("option") else torch.moreh
    assert not hasattr(owner, attribute)
    with pytest.raises(AttributeError, match=rf"{name} is an older .*: call torch.moreh.option.enable_advanced_para"):
        getattr(owner, attribute)


def test_attention_of_the_platform_is_torchs_own():
    inputs = torch.randn(3, 2, 4, 5, 8, requires_grad=True)
    actual = torch.ops.moreh.scaled_dot_product_attention(*inputs, is_causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
    assert torch.equal(actual, expected)
    gradients = [torch.autograd.grad(output.square().sum(), inputs)[0] for output in (actual, expected)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("flash_attention", "torch.nn.functional.scaled_dot_product_attention"),
        ("T5LayerNorm", "torch.nn.RMSNorm"),
        ("apply_rotary_emb", "apply_rotary_pos_emb of the model's own file"),
        ("Adafactor", "torch.optim.Adafactor"),
    ],
)
def test_other_operators_of_the_platform_name_what_to_use(name, instead):
    operator = getattr(torch.ops.moreh, name)
    with pytest.raises(OptionError, match=rf"^torch\.ops\.moreh\.{name} is .* not provide: use {instead} .*instead$"):
        operator(torch.ones(2), eps=1e-6)


def test_operators_of_this_package_are_where_they_were():
    import moreh.runtime.kernels.attention  # noqa: F401  defines it

    assert torch.ops.moreh.causal_attention.default
    assert not hasattr(torch.ops.moreh, "no_such_operator")


def test_names_of_the_platform_in_a_script_and_its_environment(run, run_python):
    run("moreh-smi", "device", "--add", "2")
    finished = run_python(SCRIPT, MOREH_VISIBLE_DEVICE="1", ACCELERATOR_PLATFORM_FLAVOR="flavor-default-8")
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert lines[-1] == "accelerator 1"
    for start in (
        "[warning] set_config('name', ...) has no effect: ",
        "[warning] set_backend_config('other', ...) has no effect: ",
        "[warning] ACCELERATOR_PLATFORM_FLAVOR=flavor-default-8 has no effect: 'moreh-switch-model'",
    ):
        assert len([line for line in lines if line.startswith(start)]) == 1
    refused = run_python(SCRIPT, MOREH_VISIBLE_DEVICE="7")
    assert "AcceleratorError: no accelerator 7: there are 0, 1" in refused.stderr
    refused = run_python(SCRIPT, MOREH_VISIBLE_DEVICE="first")
    assert "OptionError: MOREH_VISIBLE_DEVICE='first': expected the index of one accelerator" in refused.stderr


@pytest.mark.parametrize("calls", [True, False])
def test_variable_that_does_not_replace_the_line_is_named_at_the_end(run_python, calls):
    line = "torch.moreh.option.enable_advanced_parallelization()\n" if calls else ""
    script = f"import torch\n{line}torch.zeros(1).cuda()\nprint('done')"
    finished = run_python(script, MOREH_ENABLE_ADVANCED_PARALLELIZATION="1")
    after = finished.stdout.partition("done\n")[2]
    named = "[warning] MOREH_ENABLE_ADVANCED_PARALLELIZATION=1 does not replace the line, and the script ran on one"
    assert after.startswith(named) != calls
