"""Each patch of a library is declared, installed through its declaration, and listed; and there are no others."""

import subprocess
import sys

import pytest
import torch

from moreh.patches import active
from moreh.patches.catalog import declared, markdown
from moreh.patches.patch import Patch, original_of, resolve
from moreh.patches.process_changes import PROCESS_CHANGES
from tests.helpers.source.library_changes import library_changes
from tests.helpers.source.process_changes import process_changes
from tests.helpers.source.source_tree import ROOT, Source, sources

# Changes of single objects, not of the process: what is changed, by file.
OF_SINGLE_OBJECTS = {
    # A parameter that a script keeps in a list stands for the one that took its place.
    "moreh/runtime/engine/sharded/user_parameters.py": {"original.__class__, the class of an object"},
    "moreh/runtime/engine/sharded/earlier_aliases.py": {"tensor.__class__, the class of an object"},
    # A parameter whose data is in its file becomes an ordinary one once it is read.
    "moreh/runtime/sharding/lazy_parameters.py": {"parameter.__class__, the class of an object"},
    # Outputs of a model get its own class once they are complete.
    "moreh/runtime/batch/loss_output.py": {
        "outputs.__class__, the class of an object",
        "self.__class__, the class of an object",
        # Of the node that torch makes of a function of this package.
        "type(loss.grad_fn).__name__, an attribute of a class",
    },
}


def test_libraries_are_patched_in_the_package_of_patches_only():
    changes = [
        f"{source.place(node)}: {change}"
        for source in sources("moreh", "utils", "scripts", ".")
        if not source.path.startswith("moreh/patches/")
        for node, change in library_changes(source)
        if change not in OF_SINGLE_OBJECTS.get(source.path, ())
    ]
    assert not changes, (
        f"libraries are changed for the whole process in {changes}. Declare a moreh.patches.patch.Patch in a file of "
        "moreh/patches and install it through the declaration (moreh/patches/module_call.py is an example)"
    )


def test_patches_are_installed_through_their_declarations():
    changes = [
        f"{source.place(node)}: {change}"
        for source in sources("moreh/patches")
        if source.path != "moreh/patches/patch.py"
        for node, change in library_changes(source)
    ]
    assert not changes, f"changed without a Patch: {changes}. Use Patch.install or Patch.install_each"


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("import torch\ntorch.zeros = 1", "torch.zeros"),
        ("import torch\ntorch.nn.Module.to += 1", "torch.nn.Module.to"),
        ("import torch\ndel torch.zeros", "torch.zeros"),
        ("import torch\ntorch.zeros, x = 1, 2", "torch.zeros"),
        ("import torch\ntorch.zeros: int = 1", "torch.zeros"),
        ("import torch.distributed as dist\ndist.barrier = 1", "torch.distributed.barrier"),
        ("def f():\n    from torch.optim import Adam\n    Adam.step = 1", "torch.optim.Adam.step"),
        ("from torch import nn\ncls: object = nn.Module\ncls._apply = 1", "torch.nn.Module._apply"),
        ("import torch\ndef f(cls):\n    cls.to = 1\nf(torch.Tensor)", "torch.Tensor.to"),
        ("import torch\nfor m in (torch, torch.fft):\n    setattr(m, 'x', 1)", "setattr(torch, ...)"),
        ("import transformers\nsetattr(transformers.Trainer, 'x', 1)", "setattr(transformers.Trainer, ...)"),
        ("import peft\ndelattr(peft, 'x')", "delattr(peft, ...)"),
        ("from transformers.modeling_utils import TABLE\nTABLE['sdpa'] = 1", "transformers.modeling_utils.TABLE[...]"),
        ("from transformers.modeling_utils import TABLE\ndel TABLE['sdpa']", "transformers.modeling_utils.TABLE[...]"),
        ("from transformers.x import TABLE\nTABLE.update(a=1)", "transformers.x.TABLE.update(...)"),
        ("import torch\ntorch.x._methods.append(1)", "torch.x._methods.append(...)"),
        ("import torch\nvars(torch)['x'] = 1", "torch[...]"),
        ("import torch\ntorch.nn.Module.__dict__['x'] = 1", "torch.nn.Module.__dict__[...]"),
        ("import torch\nwith replaced(torch.cuda, 'init', 1): pass", "torch.cuda.init, replaced by replaced"),
        ("from unittest import mock", "an import of mock"),
        ("def f(x):\n    x.__class__ = int", "x.__class__, the class of an object"),
        ("def f(x):\n    type(x).y = 1", "type(x).y, an attribute of a class"),
        ("def f(x):\n    x.__class__.y = 1", "x.__class__.y, an attribute of a class"),
    ],
)
def test_change_of_a_library_is_seen(text, change):
    assert change in [what for _, what in library_changes(Source(text))]


@pytest.mark.parametrize(
    "text",
    [
        "import torch\nx = torch.zeros(1)\nx.data = x",
        "import torch\nclass A(torch.nn.Module):\n    def f(self):\n        self.y = torch.zeros",
        "import torch\nx = getattr(torch, 'zeros')",
        "import torch\ndef f(x):\n    x.y = 1\nf(torch.zeros(1))",
        "from torch import nn\ndef f(m):\n    g = nn.Linear\n    return g\ndef h(g):\n    g.x = 1",
        "import torch\noptions = {}\noptions.update(x=torch.float)\noptions['y'] = torch.float",
    ],
)
def test_what_changes_no_library_is_let_through(text):
    assert not list(library_changes(Source(text)))


def test_changes_of_the_process_are_declared():
    made = {(what, source.path) for source in sources("moreh") for _, what in process_changes(source)}
    listed = {(change.what, change.where) for change in PROCESS_CHANGES}
    advice = "in PROCESS_CHANGES of moreh/patches/process_changes.py"
    assert not made - listed, f"declare {sorted(made - listed)} {advice}, with the reason"
    assert not listed - made, f"delete {sorted(listed - made)} {advice}: the files do not do it any more"
    assert len(listed) == len(PROCESS_CHANGES)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("import sys\nsys.excepthook = print", "sys.excepthook"),
        ("import os\nos._exit(1)", "os._exit"),
        ("import os\nos.environ['X'] = '1'", "os.environ"),
        ("import os\ndel os.environ['X']", "os.environ"),
        ("from os import environ\nenviron.pop('X')", "os.environ"),
        ("import signal\nsignal.signal(2, print)", "signal.signal"),
        ("import gc\ngc.disable()", "gc.disable"),
        ("import warnings\nwarnings.filterwarnings('ignore')", "warnings.filterwarnings"),
        ("library.mallopt(1, 2)", "mallopt"),
        ("import ctypes\nctypes.CDLL(None).prctl(1, 2)", "prctl"),
        ("import logging\nlogging.getLogger('torch.x').setLevel(1)", "log levels of libraries"),
        ("from torch.optim import optimizer\noptimizer.register_optimizer_step_pre_hook(1)", "global hooks of torch"),
    ],
)
def test_change_of_the_process_is_seen(text, what):
    assert [seen for _, seen in process_changes(Source(text))] == [what]


@pytest.mark.parametrize(
    "text",
    [
        "import os\nx = os.environ['X']",
        "import os\nx = {**os.environ}\nx['Y'] = 1",
        "import warnings\nwith warnings.catch_warnings():\n    warnings.simplefilter('ignore')",
        "import logging\nlogging.getLogger('moreh').setLevel(1)",
    ],
)
def test_what_changes_no_process_is_let_through(text):
    assert not list(process_changes(Source(text)))


def test_every_active_patch_is_declared():
    targets = [target for patch in declared() for target in patch.targets]
    assert len(targets) == len(set(targets))
    assert {patch.target for patch in active()} <= set(targets)
    for patch in declared():
        assert patch.why.endswith(".")
        assert patch.no_public_way.endswith(".")
        assert patch.tested
        assert (ROOT / patch.file).exists()


def test_active_lists_every_replaced_name(run_python):
    source = (
        "import torch\n"
        "from dataclasses import asdict\n"
        "from moreh.patches import active\n"
        "names = {patch.target: patch for patch in active()}\n"
        "for name in ('torch.zeros', 'torch.nested.nested_tensor', 'torch.Tensor.new_ones', 'torch.Tensor.to',\n"
        "             'torch.cuda.memory.mem_get_info', 'torch.load', 'torch.moreh'):\n"
        "    assert name in names, name\n"
        "assert 'torch.nn.Module._call_impl' not in names\n"
        "torch.zeros(1, device='cuda')\n"
        "assert active()[-1].target == 'torch.nn.Module._call_impl'\n"
        "print(asdict(active()[-1]))\n"
    )
    finished = run_python(source)
    assert finished.returncode == 0, finished.stderr
    shown = finished.stdout.splitlines()[-1]
    assert "'file': 'moreh/patches/module_call.py'" in shown
    assert "'tested': ('torch 2.11', 'torch 2.13'" in shown
    assert "'why': 'Plans and computes" in shown


def test_replaced_names_differ_from_their_originals():
    for patch in active():
        assert resolve(patch.target) is not original_of(patch.target)


class Library:
    """Stands for a library."""

    value = 1

    @staticmethod
    def double(x):
        return 2 * x


class Inheriting(Library):
    """Has all its names from another class."""


def make_patch(owner=Library, **changes):
    fields = {"why": "For a test.", "no_public_way": "None.", "tested": ("torch 2.13",)}
    return Patch(**{"target": f"{owner.__module__}.{owner.__qualname__}.double", **fields, **changes})


@pytest.mark.parametrize("owner", [Library, Inheriting])
def test_patch_is_installed_once_and_taken_back(owner):
    before = dict(vars(owner))
    patch = make_patch(owner)
    original = patch.install(lambda original: lambda x: "replaced")
    try:
        assert patch.is_active
        assert owner.double(2) == "replaced"
        assert original_of(patch.target) is original
        assert active()[-1].file == "tests/patches/test_declarations.py"
        with pytest.raises(AssertionError, match="is patched already"):
            patch.install(lambda original: original)
    finally:
        patch.uninstall()
    assert owner.double(2) == 4
    assert dict(vars(owner)) == before
    assert not patch.is_active


def test_group_replaces_each_name():
    patch = make_patch(target=f"{__name__}.Library", names=("value", "double"))
    patch.install_each(lambda name, original: (name, original))
    try:
        assert Library.value == ("value", 1)
        assert [target.rpartition(".")[2] for target in patch.targets] == ["value", "double"]
        with pytest.raises(AssertionError, match="is a group"):
            patch.install(lambda original: original)
    finally:
        patch.uninstall()
    assert Library.value == 1
    assert Library.double(2) == 4


def test_added_name_is_taken_away_again():
    patch = make_patch(target=f"{__name__}.Library.added", adds=True)
    assert patch.install(lambda original: original) is None
    assert Library.added is None
    patch.uninstall()
    assert not hasattr(Library, "added")
    with pytest.raises(AssertionError, match=r"Library\.gone does not exist"):
        make_patch(target=f"{__name__}.Library.gone").install(lambda original: original)


def test_dotted_names_are_resolved():
    assert resolve("torch.nn.Module") is torch.nn.Module
    assert resolve("torch.distributed.checkpoint.filesystem").__name__ == "torch.distributed.checkpoint.filesystem"
    with pytest.raises(ImportError):
        resolve("no_such_library.x")
    with pytest.raises(AttributeError):
        resolve("torch.nn.Module.no_such_method")


def test_list_of_patches_names_every_patch_in_narrow_lines():
    text = markdown()
    assert max(map(len, text.splitlines())) <= 120
    for patch in declared():
        assert f"`{patch.target}`" in text
        assert f"`{patch.file}`" in text
    for change in PROCESS_CHANGES:
        assert f"`{change.what}` in `{change.where}`" in text


def test_table_of_patches_is_printed(run):
    finished = run(sys.executable, "-m", "moreh.patches")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == markdown() + "\n"


def test_declarations_can_be_listed_without_importing_torch_first():
    source = "from moreh.patches.catalog import declared; print(len(declared()))"
    finished = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) == len(declared())
