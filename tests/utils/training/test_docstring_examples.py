"""Docstring examples of held-out functions, run with the bodies that a model has written."""

import json

import pytest

from utils.errors import UserError
from utils.training import docstring_examples, evaluation
from utils.training.docstring_examples import examples_need_body, examples_pass, functions_with_examples

SIGNATURE = 'def add(a, b):\n    """Add.\n\n    >>> add(2, 3)\n    5\n    """\n'
BODY = "    return a + b\n"


@pytest.mark.parametrize(("body", "passes"), [
    (BODY, True),
    ("    return 5\n\n\nprint('more')\n", True),
    ("    return a * b\n", False),
    ("    return a +\n", False),
    ("    import sys\n    sys.exit(0)\n", False),
    ("    import os\n    os._exit(0)\n", False),
    ("    return a + b\n\n\nimport os\nos.environ['HOME']\n", False),
    ("    return [0] * 2**33\n", False),
    ("    open('f', 'w').write('x' * 2**22)\n    return 5\n", False),
    ("\nimport os\nos.write(1, b'x' * 2**22)\n", False),
])  # fmt: skip
def test_only_the_right_body_passes(body, passes):
    assert examples_pass(SIGNATURE + body) is passes


def test_function_without_examples_does_not_pass():
    assert not examples_pass("def f():\n    return 1\n")


def test_endless_body_is_ended(monkeypatch):
    monkeypatch.setattr(docstring_examples, "_TIMEOUT_S", 0.5)
    assert not examples_pass(SIGNATURE + "    import time\n    time.sleep(1000)\n")


def test_directory_and_environment_of_the_run_are_hidden(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "1")
    body = "    import os\n    open('f', 'w')\n    return 5 + len(os.environ.get('SECRET', ''))\n"
    assert examples_pass(SIGNATURE + body)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("signature", "body", "counts"), [
    (SIGNATURE, BODY, True),
    (SIGNATURE, "    return 6\n", False),
    (SIGNATURE.replace("add(2, 3)\n    5", "2 + 3\n    5"), BODY, False),  # shows nothing of the function
    ("Write a function.\n" + SIGNATURE, BODY, False),
    ('def add(self, b):\n    """Add.\n\n    >>> Class().add(1)\n    2\n    """\n', BODY, False),
])  # fmt: skip
def test_examples_count_if_they_test_the_body(signature, body, counts):
    assert examples_need_body(signature, body) is counts


def test_first_functions_are_chosen():
    plain = ("def f():\n", "    pass\n")
    functions = [plain, (SIGNATURE, BODY), (SIGNATURE, "    pass\n"), (SIGNATURE, BODY), (SIGNATURE, BODY)]
    assert functions_with_examples(functions, 2) == [1, 3]
    assert functions_with_examples([plain], 2) == []


def test_run_has_the_share_of_the_first_and_the_last_step(train, read_metrics, monkeypatch, capsys, tmp_path):
    rows = [
        {
            "prompt": f'def add_{n}(x):\n    """Add.\n\n    >>> add_{n}(1)\n    {n + 1}\n    """\n',
            "response": f"    return x + {n}\n",
        }
        for n in range(12)
    ]
    (tmp_path / "functions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    bodies = iter(["    return 0\n", "    return x +\n", "    return 1\n"])
    functions = []

    def generate(model, prompt_ids, tokenizer, max_new_tokens, *, is_drawn=True):
        if is_drawn:
            return "a sample"
        functions.append(tokenizer.decode(prompt_ids))
        number = int(functions[-1].split("_")[1].split("(")[0])
        return next(bodies, f"    return x + {number}\n")

    monkeypatch.setattr(evaluation, "generate_sample", generate)
    data = f"data={{files: [{tmp_path / 'functions.jsonl'}], max_length: 128, eval_rows: 4}}"
    directory = train(data, "log.example_functions=3", "train.batch_size=2", "model.architecture.n_positions=128")
    lines = read_metrics(directory)
    assert [line["examples_passed"] for line in lines if "examples_passed" in line] == [0.0, 1.0]
    assert functions[:3] == functions[3:]
    output = capsys.readouterr().out
    assert "[Step 0/4] | Docstring examples: those of 0 of 3 functions pass" in output
    assert "[Step 4/4] | Docstring examples: those of 3 of 3 functions pass" in output
    assert "Docstring examples" in (directory / "report.html").read_text(encoding="utf-8")


def test_data_without_such_functions_are_refused(train):
    with pytest.raises(UserError, match=r"log\.example_functions: none of the \d+ held-out rows is a Python function"):
        train("log.example_functions=3")
