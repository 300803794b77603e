"""MOREH_CUDA_FACE decides who sees the accelerator in torch.cuda."""

import pytest
import torch  # noqa: F401  loads moreh completely

from moreh.errors import OptionError
from moreh.patches.cuda.face import Audience, audience_from_environment

ASKING = """
import warnings
import torch
import transformers
import user_package
warnings.simplefilter("ignore")
print("script", torch.cuda.is_available())
print("user's package", user_package.sees_accelerator())
print("transformers", transformers.utils.is_torch_cuda_available())
print("torch", torch.amp.GradScaler("cuda").is_enabled())
"""


@pytest.fixture
def run_asking(run_python, run_python_forked, tmp_path):
    """Runs a script that imports a package of the user's from a directory of installed packages.

    The variable is read when torch is imported; without it, the script may be forked.
    """
    packages = tmp_path / "site-packages"
    packages.mkdir()
    (packages / "user_package.py").write_text(
        "import torch\ndef sees_accelerator():\n    return torch.cuda.is_available()\n", encoding="utf-8"
    )

    def run(source, **variables):
        start = run_python if variables else run_python_forked
        finished = start(source, PYTHONPATH=str(packages), **variables)
        assert finished.returncode == 0, finished.stderr
        return [line for line in finished.stdout.splitlines() if not line.startswith("[info]")]

    return run


def test_scripts_alone_see_the_accelerator_without_the_variable(run_asking):
    assert run_asking(ASKING) == ["script True", "user's package False", "transformers False", "torch False"]


TRAINING = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from user_package import sees_accelerator
assert sees_accelerator()
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16)).cuda().train()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
rows = torch.arange(32).remainder(16).reshape(4, 8)
losses = []
for batch in [*torch.utils.data.DataLoader(rows, batch_size=2, pin_memory=True)] * 4:
    batch = batch.cuda()
    with torch.autocast("cuda"):
        loss = model(batch, labels=batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
model.save_pretrained("saved")
GPT2LMHeadModel.from_pretrained("saved").cuda().generate(batch[:1, :2], max_new_tokens=2, pad_token_id=0)
assert torch.cuda.max_memory_allocated() > 0
print(losses[-1] < losses[0])
"""


def test_training_works_where_libraries_see_the_accelerator_too(run_asking):
    seen = ["script True", "user's package True", "transformers True", "torch False"]
    assert run_asking(ASKING + TRAINING, MOREH_CUDA_FACE="1") == [*seen, "True"]


def test_nobody_sees_the_accelerator_and_nothing_of_torch_is_replaced_without_the_face(run_asking):
    source = (
        f"{ASKING}"
        "import torch\n"
        "from moreh.patches import active\n"
        "own = ('torch.moreh', 'torch.version.moreh', 'torch.ops.moreh.')\n"
        "print([patch.target for patch in active() if not patch.target.startswith(own)])\n"
        "print(callable(torch.moreh.option.enable_advanced_parallelization))\n"
        "try:\n"
        "    torch.ones(1).cuda()\n"
        "except (AssertionError, RuntimeError):\n"  # of a CPU build, and of a CUDA build without a driver
        "    print('no GPU')\n"
    )
    shown = run_asking(source, MOREH_CUDA_FACE="0")
    seen = ["script False", "user's package False", "transformers False", "torch False"]
    assert shown == [*seen, "[]", "True", "no GPU"]


def test_other_values_are_refused_in_one_line(run_python, monkeypatch):
    finished = run_python("import torch", MOREH_CUDA_FACE="yes")
    message = (
        "moreh.errors.OptionError: MOREH_CUDA_FACE='yes': expected 0 (nobody sees the accelerator in torch.cuda) or "
        "1 (libraries see it too); if unset, scripts alone see it"
    )
    assert finished.returncode == 1
    assert finished.stderr.splitlines().count(message) == 1
    monkeypatch.setenv("MOREH_CUDA_FACE", "2")
    with pytest.raises(OptionError, match="MOREH_CUDA_FACE='2': expected 0"):
        audience_from_environment()


@pytest.mark.parametrize(
    ("text", "audience"),
    [("", Audience.SCRIPTS), (" ", Audience.SCRIPTS), ("0", Audience.NOBODY), (" 1 ", Audience.EVERYBODY)],
)
def test_variable_is_read(monkeypatch, text, audience):
    monkeypatch.setenv("MOREH_CUDA_FACE", text)
    assert audience_from_environment() is audience
