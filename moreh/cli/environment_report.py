"""The report of `moreh-smi --version --json` on installation and machine, for bug reports.

Nothing here imports torch: it may be what is broken, and importing it takes seconds.
"""

import ast
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from moreh.system import available_cores
from moreh.version import __version__

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")
VARIABLES = re.compile(
    "MOREH_.*|GOMP_.*|OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|HF_HUB_OFFLINE|TORCH_DEVICE_BACKEND_AUTOLOAD"
)
HIDDEN = "(hidden)"
_SECRET_NAME = re.compile("TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_SECRET_IN_URL = re.compile(r"(?<=://)[^/\s@]*@")
# The fields of a `Patch` of moreh.patches, in their order.
_PATCH_FIELDS = ("target", "why", "no_public_way", "tested", "names")


def environment_report() -> dict[str, Any]:
    """Versions, machine, environment variables and patches. What is not known is null."""
    memory = psutil.virtual_memory()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": {
            "model": cpu_model(),
            "physical_cores": psutil.cpu_count(logical=False),
            "logical_cores": psutil.cpu_count(),
            "available_cores": available_cores(),
        },
        "memory": {"total_bytes": memory.total, "available_bytes": memory.available},
        "gpus": [*nvidia_gpus(Path("/proc")), *amd_gpus(Path("/sys"))],
        "environment": environment_variables(os.environ),
        "patches": declared_patches(Path(__file__).parent.parent / "patches"),
    }


def environment_variables(environment: "os._Environ[str] | dict[str, str]") -> dict[str, str]:
    """The variables that affect moreh, without values that look secret."""
    return {
        name: HIDDEN if _SECRET_NAME.search(name) else _SECRET_IN_URL.sub(f"{HIDDEN}@", value)
        for name, value in sorted(environment.items())
        if VARIABLES.fullmatch(name)
    }


def nvidia_gpus(proc: Path) -> list[dict[str, Any]]:
    """The GPUs that NVIDIA's kernel driver lists under /proc. It does not tell their memory."""
    driver = re.search(r"Kernel Module\D*([\d.]+)", _content(proc / "driver/nvidia/version") or "")
    return [
        {
            "name": _field(_content(information), "Model"),
            "memory_bytes": None,
            "driver": driver and driver[1],
        }
        for information in sorted(proc.glob("driver/nvidia/gpus/*/information"))
    ]


def amd_gpus(sys: Path) -> list[dict[str, Any]]:
    """The GPUs that AMD's kernel driver lists under /sys."""
    devices = [card / "device" for card in sorted(sys.glob("class/drm/card*")) if card.name[4:].isdecimal()]
    gpus = []
    for device in devices:
        memory = _content(device / "mem_info_vram_total")
        if _content(device / "vendor") == "0x1002" and memory:
            name = _content(device / "product_name") or f"AMD device {_content(device / 'device')}"
            driver = _content(sys / "module/amdgpu/version")
            gpus.append({"name": name, "memory_bytes": int(memory), "driver": driver})
    return gpus


def declared_patches(directory: Path) -> list[dict[str, Any]]:
    """The process-wide patches that the sources in a directory declare.

    They are read from the sources, because importing the modules would import torch. A field that is not a literal is
    given as its source. `file` is relative to the directory.
    """
    patches: list[dict[str, Any]] = []
    for path in sorted(directory.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "Patch":
                fields = dict(zip(_PATCH_FIELDS, node.args, strict=False))
                fields |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
                shown = {name: _literal(fields[name]) for name in _PATCH_FIELDS if name in fields}
                patches.append({**shown, "file": path.relative_to(directory).as_posix()})
    return patches


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def package_version(name: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The name of the CPU."""
    return _field(_content(Path("/proc/cpuinfo")), "model name") or platform.processor() or platform.machine()


def _field(content: str | None, name: str) -> str | None:
    """The value in the first line `name: value` of a text."""
    match = re.search(rf"^{re.escape(name)}\s*:\s*(.*\S)", content or "", re.MULTILINE)
    return match and match[1]


def _content(path: Path) -> str | None:
    """The text of a file; None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
