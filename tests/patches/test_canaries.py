"""What is replaced or used of libraries beyond their public interface is what the package was written for.

A failure here after an upgrade says which name has changed, how, who uses it and what to look at.
"""

import json
import subprocess
import sys

import pytest
import torch

from moreh.patches.catalog import declared
from tests.helpers.source import canaries
from tests.helpers.source.library_internals import INTERNALS, NOT_EVERYWHERE
from tests.helpers.source.private_names import is_covered, private_names_of_libraries
from tests.helpers.source.source_tree import ROOT, Source, sources

TORCH = {"torch": (2, 13)}
STORED = {"torch 2.13": {"torch.load": {"signature": "(f)", "source": "1"}}}


@pytest.fixture(scope="module")
def installed():
    """The fingerprints of the installed versions, from a process in which nothing else has replaced anything."""
    source = "import json; from tests.helpers.source.canaries import fingerprints; print(json.dumps(fingerprints()))"
    finished = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", sorted(canaries.names()))
def test_name_of_a_library_is_what_it_was_written_for(installed, name):
    versions = {library: canaries.installed_version(library) for library in {canaries.library_of(name)}}
    changed = canaries.changes({name: installed[name]}, canaries.read_store(), versions)
    assert not changed, changed[name]


def test_every_name_is_there(installed):
    added = {target for patch in declared() if patch.adds for target in patch.targets}
    absent = {name for name, value in installed.items() if value["signature"] == "not there"}
    assert absent - NOT_EVERYWHERE.keys() == added


def test_stored_names_are_still_used():
    stored = {name for of_version in canaries.read_store().values() for name in of_version}
    unused = stored - canaries.names().keys()
    assert not unused, f"no patch replaces {sorted(unused)} any more: store the others with {canaries.COMMAND}"


def test_private_names_in_the_source_are_listed():
    listed = canaries.names()
    missing = [
        f"{source.place(node)}: {name}"
        for source, node, name in private_names_of_libraries(sources("moreh"))
        if not is_covered(name, listed)
    ]
    assert not missing, (
        f"private names of libraries without a canary: {missing}. Add them to "
        "tests/helpers/source/library_internals.py, with what is relied on, and "
        f"store them with {canaries.COMMAND}"
    )


def test_listed_names_are_still_in_the_source():
    unused = [name for name in INTERNALS if not canaries.users(name)]
    assert not unused, f"nothing in moreh uses {unused}: delete them from tests/helpers/source/library_internals.py"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("from torch import nn\nx = nn.modules.dropout._DropoutNd", "torch.nn.modules.dropout._DropoutNd"),
        ("import torch\ntorch._C._foo()", "torch._C._foo"),
        ("def f(tensor):\n    return tensor._version", "._version"),
        ("class A:\n    def _go(self):\n        super()._go()", "._go"),
        ("def f(tensors):\n    return tensors[0].data._version.real", "._version"),
        ("def f(x):\n    return x._C._profiler._Span", "._C._profiler._Span"),
        ("class A:\n    def f(self):\n        self._own = 1\n        return self._own._theirs", "._theirs"),
    ],
)
def test_private_name_is_seen(text, name):
    assert [seen for _, _, seen in private_names_of_libraries([Source(text)])] == [name]
    assert not is_covered(name, ["torch.other", "torch.nn.Module:_versions"])
    assert is_covered(name, [f"torch.x{name}" if name.startswith(".") else name])


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.zeros(1)",
        "class A:\n    def _go(self):\n        self._go()",
        "import argparse\ngroup: argparse._ArgumentGroup",
        "def f(named_tuple):\n    return named_tuple._asdict()",
    ],
)
def test_public_or_own_name_is_no_private_name_of_a_library(text):
    assert not list(private_names_of_libraries([Source(text)]))


@pytest.mark.parametrize(
    ("now", "parts"),
    [
        (
            {"signature": "(f, x)", "source": "2"},
            ["torch.load is replaced in moreh/patches/cuda/device_types.py", "signature was  (f)", "is   (f, x)"],
        ),
        ({"signature": "(f)", "source": "2"}, ["Its source differs", "Look at torch.load in torch/serialization.py"]),
        ({"signature": "not there", "source": ""}, ["signature was  (f)", "is   not there"]),
    ],
)
def test_change_says_which_patch_what_changed_and_what_to_look_at(now, parts):
    versions = {"torch": (2, 14)}
    (message,) = canaries.changes({"torch.load": now}, STORED, versions).values()
    for part in [*parts, "stored is torch 2.13, installed is torch 2.14", "python -m tests.helpers.source.canaries"]:
        assert part in message


def test_function_that_another_build_has_in_c_has_one_fingerprint(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = "if {}:\n    go = len\nelse:\n\n    def go(x: int = 1) -> int:\n        return x\n\n\nother = len\n"
    for name in ("build_in_c", "build_in_python"):
        (tmp_path / f"{name}.py").write_text(source.format(name == "build_in_c"), encoding="utf-8")
    in_c, in_python = canaries.fingerprint("build_in_c.go"), canaries.fingerprint("build_in_python.go")
    assert in_c == in_python
    assert in_c["signature"] == "(x=1)"
    assert canaries.fingerprint("build_in_c.other") == canaries.fingerprint("build_in_python.other") != in_c


def test_new_name_is_asked_for():
    (message,) = canaries.changes({"torch.zeros": {"signature": "()", "source": ""}}, STORED, TORCH).values()
    assert "There is nothing to compare it with" in message


def test_same_fingerprint_in_another_version_is_fine():
    assert not canaries.changes(STORED["torch 2.13"], STORED, {"torch": (2, 14)})


@pytest.mark.parametrize(
    ("version", "nearest"),
    [((2, 13), (2, 13)), ((2, 14), (2, 13)), ((2, 20), (2, 18)), ((3, 0), (2, 13)), ((1, 0), None)],
)
def test_unknown_version_is_compared_with_the_nearest_stored_one(version, nearest):
    stored = {"torch 2.13": {}, "torch 2.18": {}, "transformers 5.23": {}}
    library = "torch" if nearest else "peft"
    assert canaries.nearest_version(stored, library, version) == nearest


def test_private_functions_in_c_behave_as_they_are_used():
    """They have no source and hardly any documentation."""
    in_backward = []
    leaf = torch.ones(2, requires_grad=True)
    leaf.register_hook(lambda _: in_backward.append(torch._C._current_graph_task_id()))
    assert torch._C._current_graph_task_id() == -1
    leaf.sum().backward()
    assert in_backward != [-1]

    autograd = torch._C._autograd
    assert autograd._top_saved_tensors_default_hooks(True) is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert autograd._top_saved_tensors_default_hooks(True) is not None
    assert autograd._saved_tensors_hooks_is_enabled()
    with torch.autograd.graph.disable_saved_tensors_hooks("off"):
        assert not autograd._saved_tensors_hooks_is_enabled()

    wrapped = []
    torch.func.grad(lambda x: wrapped.append(torch._C._functorch.is_functorch_wrapped_tensor(x)) or x.sum())(
        torch.ones(2)
    )
    assert wrapped == [True]
    assert not torch._C._functorch.is_functorch_wrapped_tensor(leaf)

    tensor = torch.ones(2)
    version = tensor._version
    tensor.add_(1)
    assert tensor._version == version + 1
    assert tensor.untyped_storage()._cdata == tensor[:1].untyped_storage()._cdata
    assert tensor.untyped_storage()._cdata != torch.ones(2).untyped_storage()._cdata
    leaf.register_post_accumulate_grad_hook(lambda _: None)
    assert leaf._backward_hooks
    assert leaf._post_accumulate_grad_hooks
    assert not torch.ones(2, requires_grad=True)._backward_hooks
    assert not torch.ones(2, requires_grad=True)._post_accumulate_grad_hooks

    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    probabilities, grad_output = scores.softmax(-1), torch.randn(3, 4, dtype=torch.float64)
    (expected,) = torch.autograd.grad(probabilities, scores, grad_output)
    actual = torch._softmax_backward_data(grad_output, probabilities.detach(), -1, torch.float64)
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-14)
    bags = torch._embedding_bag_forward_only(torch.eye(4), torch.tensor([0, 1, 3]), torch.tensor([0, 2]))[0]
    assert bags.tolist() == [[1, 1, 0, 0], [0, 0, 0, 1]]


def test_nodes_of_a_backward_pass_say_whether_it_computes_them():
    first, second = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    nodes = [torch.autograd.graph.get_gradient_edge(leaf).node for leaf in (first, second)]
    seen = []
    loss = (first * second).sum()
    loss.register_hook(lambda _: seen.append([torch._C._will_engine_execute_node(node) for node in nodes]))
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True, inputs=[second])
    assert seen == [[True, True], [False, True]]
    with pytest.raises(RuntimeError, match="leaf node"):
        torch.autograd.grad(loss, [first])
