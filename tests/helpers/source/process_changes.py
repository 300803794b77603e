"""Finds where source code changes its process: handlers, environment variables, the allocator, warnings, exits."""

import ast
from collections.abc import Iterator

from tests.helpers.source.source_tree import Source, assigned

_CALLS = {
    *(f"os.{name}" for name in ("_exit", "abort", "chdir", "dup2", "execv", "execve", "execvp", "execvpe")),
    *(f"os.{name}" for name in ("nice", "register_at_fork", "sched_setaffinity", "setpgid", "setsid", "umask")),
    *(f"gc.{name}" for name in ("disable", "enable", "freeze", "set_threshold")),
    *(f"logging.{name}" for name in ("basicConfig", "captureWarnings", "disable", "setLoggerClass")),
    *(f"sys.{name}" for name in ("setprofile", "setrecursionlimit", "setswitchinterval", "settrace")),
    *(f"torch.{name}" for name in ("set_default_device", "set_default_dtype", "set_default_tensor_type")),
    *(f"torch.{name}" for name in ("set_flush_denormal", "set_num_interop_threads", "set_num_threads")),
    *(f"warnings.{name}" for name in ("filterwarnings", "resetwarnings", "simplefilter")),
    "atexit.register",
    "faulthandler.enable",
    "locale.setlocale",
    "multiprocessing.set_start_method",
    "resource.setrlimit",
    "signal.set_wakeup_fd",
    "signal.signal",
}
_ENVIRONMENT_METHODS = {"clear", "pop", "popitem", "setdefault", "update"}
# Called on whatever stands for the C library, a stream or a library's logging.
_METHODS = {
    "disable_progress_bar": "progress bars of libraries",
    "disable_progress_bars": "progress bars of libraries",
    "mallopt": "mallopt",
    "malloc_trim": "mallopt",
    "prctl": "prctl",
    "reconfigure": "sys.stdout.reconfigure",
    "set_verbosity": "log levels of libraries",
    "set_verbosity_error": "log levels of libraries",
    "set_verbosity_warning": "log levels of libraries",
}


def process_changes(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Each change of the process in a file: the node, and what is changed, as `ProcessChange.what` names it."""
    for node in source.nodes:
        for target in assigned(node):
            owner = target.value if isinstance(target, ast.Attribute | ast.Subscript) else target
            if source.dotted(owner) == "sys" and isinstance(target, ast.Attribute):
                yield node, f"sys.{target.attr}"
            elif source.dotted(owner) == "os.environ" and isinstance(target, ast.Subscript):
                yield node, "os.environ"
        if isinstance(node, ast.Call):
            what = _changed_by_call(source, node)
            if what is not None and not _within_catch_warnings(source, node):
                yield node, what


def _changed_by_call(source: Source, call: ast.Call) -> str | None:
    name = source.dotted(call.func) or ""
    if name in _CALLS:
        return name
    owner, _, method = name.rpartition(".")
    if owner == "os.environ" and method in _ENVIRONMENT_METHODS:
        return "os.environ"
    if method.startswith(("register_optimizer_step_", "register_module_")) and owner.startswith("torch."):
        return "global hooks of torch"
    if isinstance(call.func, ast.Attribute):
        if call.func.attr == "setLevel" and _is_logger_of_library(source, call.func.value):
            return "log levels of libraries"
        return _METHODS.get(call.func.attr)
    return None


def _is_logger_of_library(source: Source, node: ast.expr) -> bool:
    """True if an expression is `logging.getLogger("...")` with a name that is not this project's."""
    if not isinstance(node, ast.Call) or source.dotted(node.func) != "logging.getLogger" or not node.args:
        return False
    name = node.args[0]
    return isinstance(name, ast.Constant) and not str(name.value).startswith(("moreh", "train"))


def _within_catch_warnings(source: Source, node: ast.AST) -> bool:
    """True if `with warnings.catch_warnings():` takes a change back."""
    contexts = (
        source.dotted(item.context_expr.func)
        for parent in source.enclosing(node)
        if isinstance(parent, ast.With)
        for item in parent.items
        if isinstance(item.context_expr, ast.Call)
    )
    return "warnings.catch_warnings" in contexts
