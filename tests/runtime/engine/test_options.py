"""enable_advanced_parallelization: its signature, its documentation, and what it says to options that are wrong."""

import inspect
import pydoc
from dataclasses import fields

import pytest

from moreh import option
from moreh.errors import OptionError
from moreh.options import OPTIMIZATIONS, ParallelOptions

OPTIONS = {field.name: field for field in fields(ParallelOptions)}


@pytest.fixture
def run(run_forked):
    return run_forked


def test_signature_is_that_of_the_declarations():
    signature = inspect.signature(option.enable_advanced_parallelization)
    assert list(signature.parameters) == list(OPTIONS)
    assert signature.return_annotation is None
    for name, parameter in signature.parameters.items():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default == OPTIONS[name].default
        assert parameter.annotation == OPTIONS[name].type


def test_help_documents_every_option():
    text = pydoc.plain(pydoc.render_doc(option.enable_advanced_parallelization))
    assert "enable_advanced_parallelization(*, pipeline_parallel: bool = True, num_stages: " in text
    sections = [
        text.index(section) for section in ("Call it once, before the script creates its model.", "Args:", "Raises:")
    ]
    assert sections == sorted(sections)
    one_line = " ".join(text.split())
    for name, field in OPTIONS.items():
        assert f"{name}: {field.metadata['doc']} Allowed: {field.metadata['allowed']}." in one_line
    assert all(name in text for name in OPTIMIZATIONS)
    documentation = text.splitlines()[text.splitlines().index("    Args:") :]
    assert max(map(len, documentation)) <= 120


@pytest.fixture(scope="module")
def mypy_cache(tmp_path_factory):
    """A directory for what mypy finds out about this package."""
    return str(tmp_path_factory.mktemp("mypy"))


TYPED = """
from moreh.option import enable_advanced_parallelization
enable_advanced_parallelization(num_stages=4, disable=("pack_rows",))
{wrong}
"""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("enable_advanced_parallelization(True)", "Too many positional arguments"),
        ("enable_advanced_parallelization(num_stage=4)", 'did you mean "num_stages"?'),
        ("enable_advanced_parallelization(num_stages='all')", 'incompatible type "Literal['),
        ("", "Success"),
    ],
)
def test_type_checkers_see_the_options(tmp_path, mypy_cache, wrong, message):
    api = pytest.importorskip("mypy.api")
    (tmp_path / "script.py").write_text(TYPED.format(wrong=wrong), encoding="utf-8")
    report, errors, _ = api.run(["--cache-dir", mypy_cache, "--follow-imports=silent", str(tmp_path / "script.py")])
    assert message in report, errors
    assert report.count("error:") == (1 if wrong else 0)


def test_positional_arguments_are_refused_with_the_names_of_the_options():
    with pytest.raises(
        OptionError, match=r"\(True, 4\): options are given by name, such as num_stages=4\. .*: pipeline_p"
    ):
        option.enable_advanced_parallelization(True, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_stage": 4}, r"unknown option num_stage=4; did you mean num_stages\?"),
        ({"pipeline_parallel": 1}, "pipeline_parallel=1: expected True or False"),
        ({"pipeline_parallel": "auto"}, "pipeline_parallel='auto': expected True or False"),
        ({"mixed_precision": None}, "mixed_precision=None: expected True or False"),
        ({"num_stages": 0}, 'num_stages=0: expected a whole number from 1, or "auto"'),
        ({"num_stages": True}, "num_stages=True: expected a whole number"),
        ({"num_stages": 2.0}, "num_stages=2.0: expected a whole number"),
        ({"num_micro_batches": "many"}, "num_micro_batches='many': expected"),
        ({"activation_recomputation": "full"}, "activation_recomputation='full': expected True, False or \"auto\""),
        ({"distribute_parameter": 1}, "distribute_parameter=1: expected"),
        ({"pipeline_parallel": False, "num_stages": 4}, "stages need pipeline_parallel=True"),
        ({"pack_rows": False}, r'unknown option pack_rows=False\. .* give disable=\("pack_rows",\)'),
        (
            {"disable": "pack_rows"},
            r"disable='pack_rows': expected a list of optimizations, such as \('skip_padding',\)",
        ),
        (
            {"disable": ["pack_row"]},
            r"there is no optimization 'pack_row'; did you mean pack_rows\? The optimizations are: ",
        ),
    ],
)
def test_wrong_option_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        option.enable_advanced_parallelization(**options)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("DETAILED_LOG", "3", "from 0 to 2; 0 if unset"),
        ("DETAILED_LOG", "yes", "from 0 to 2"),
        ("MEMORY_USAGE_CORRECTION_RATIO", "0", "from 1 to 100; 80 if unset"),
        ("MEMORY_USAGE_CORRECTION_RATIO", "0.8", "from 1 to 100"),
        ("MAX_PARALLEL_COMPILE_THREADS", "-1", "from 1 to 1024; 16 if unset"),
    ],
)
def test_wrong_environment_variable_is_refused(monkeypatch, name, value, allowed):
    monkeypatch.setenv(f"MOREH_ADVANCED_PARALLELIZATION_{name}", value)
    with pytest.raises(OptionError, match=f"{name}='{value}': expected a whole number {allowed}"):
        option.enable_advanced_parallelization()


def test_second_call_must_agree(run_python):
    source = (
        "import torch\n"
        "enable = torch.moreh.option.enable_advanced_parallelization\n"
        "enable(mixed_precision=False)\n"
        "enable(mixed_precision=False)\n"
        "print('agreed')\n"
        "enable()\n"
    )
    finished = run_python(source)
    assert "agreed" in finished.stdout
    assert "already enabled" in finished.stderr
