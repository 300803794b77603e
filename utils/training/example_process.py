"""Runs the docstring examples of a source within limits; `docstring_examples.py` starts it as a process of its own.

Standard input has a word, and after it the source. The word is written at the end if all examples pass: code that ends
the process early, with whatever exit code, cannot write it.
"""

import contextlib
import doctest
import io
import resource
import sys
import types

# What one source may use. The limits end the process.
LIMITS = {
    resource.RLIMIT_CPU: 10,  # seconds
    resource.RLIMIT_AS: 2**30,
    resource.RLIMIT_FSIZE: 2**20,
    resource.RLIMIT_CORE: 0,
}


def all_examples_pass(source: str) -> bool:
    """True if a source has docstring examples, and all of them pass."""
    module = types.ModuleType("source")
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(source, "source", "exec"), module.__dict__)
        runner = doctest.DocTestRunner(verbose=False)
        for test in doctest.DocTestFinder().find(module, globs=module.__dict__):
            runner.run(test)
    return runner.tries > 0 and runner.failures == 0


if __name__ == "__main__":
    for limit, value in LIMITS.items():
        resource.setrlimit(limit, (value, value))
    word = sys.stdin.readline()
    if all_examples_pass(sys.stdin.read()):
        print(word, end="")
