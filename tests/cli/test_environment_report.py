"""moreh-smi --version --json: what a report of a bug needs to say."""

import json
import platform
import sys
from importlib import metadata
from pathlib import Path

import psutil
import torch  # noqa: F401  loads moreh completely; a module of moreh.patches that came first would be loaded in a circle

from moreh.cli.environment_report import amd_gpus, declared_patches, environment_variables, nvidia_gpus
from moreh.patches.module_call import MODULE_CALL
from moreh.version import __version__

ROOT = Path(__file__).parent.parent.parent


def test_report_names_versions_and_machine(run):
    finished = run("moreh-smi", "--version", "--json", OMP_NUM_THREADS="1", MOREH_WORKERS="2", UNRELATED="x")
    assert (finished.returncode, finished.stderr) == (0, "")
    report = json.loads(finished.stdout)
    assert report["version"] == __version__
    assert report["python"] == platform.python_version()
    assert report["platform"] == platform.platform()
    for name in ("torch", "transformers", "peft"):
        assert report["packages"][name] == metadata.version(name)
    assert report["cpu"]["model"]
    assert 1 <= report["cpu"]["available_cores"] <= report["cpu"]["logical_cores"]
    assert report["memory"]["total_bytes"] == psutil.virtual_memory().total
    assert isinstance(report["gpus"], list)
    assert report["environment"].items() >= {"OMP_NUM_THREADS": "1", "MOREH_WORKERS": "2"}.items()
    assert "UNRELATED" not in report["environment"]
    assert MODULE_CALL.target in [patch["target"] for patch in report["patches"]]


def test_report_needs_no_torch(run):
    source = (
        "import sys, moreh.cli.smi as m; sys.argv = ['moreh-smi', '--version', '--json']; m.main(); "
        "print('torch' in sys.modules)"
    )
    assert run(sys.executable, "-c", source).stdout.endswith("\nFalse\n")


def test_package_that_is_not_installed_is_null(run):
    source = (
        "import sys; from importlib import metadata; version = metadata.version\n"
        "def other(name):\n"
        "    if name == 'peft': raise metadata.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "metadata.version = other\n"
        "import moreh.cli.smi as m; sys.argv = ['moreh-smi', '-v', '--json']; m.main()"
    )
    packages = json.loads(run(sys.executable, "-c", source).stdout)["packages"]
    assert packages["peft"] is None
    assert packages["torch"] is not None


def test_secret_values_are_hidden():
    shown = environment_variables(
        {
            "MOREH_API_TOKEN": "t0ken",
            "MOREH_MIRROR": "https://user:passw0rd@example.org/x",
            "MOREH_WORKERS": "4",
            "GOMP_SPINCOUNT": "1000",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_TOKEN": "t0ken",
            "HF_HUB_OFFLINE": "1",
            "PATH": "/bin",
        }
    )
    assert shown == {
        "CUDA_VISIBLE_DEVICES": "",
        "GOMP_SPINCOUNT": "1000",
        "HF_HUB_OFFLINE": "1",
        "MOREH_API_TOKEN": "(hidden)",
        "MOREH_MIRROR": "https://(hidden)@example.org/x",
        "MOREH_WORKERS": "4",
    }


def test_gpus_are_those_that_the_kernel_drivers_list(tmp_path):
    nvidia = tmp_path / "proc" / "driver" / "nvidia"
    (nvidia / "gpus" / "0000:0f:00.0").mkdir(parents=True)
    (nvidia / "gpus" / "0000:0f:00.0" / "information").write_text(
        "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 188\nGPU UUID: \t GPU-1\n", encoding="utf-8"
    )
    (nvidia / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n", encoding="utf-8"
    )
    assert nvidia_gpus(tmp_path / "proc") == [
        {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": None, "driver": "550.54.15"}
    ]

    device = tmp_path / "sys" / "class" / "drm" / "card1" / "device"
    device.mkdir(parents=True)
    for name, content in {"vendor": "0x1002", "device": "0x740c", "mem_info_vram_total": "68702699520"}.items():
        (device / name).write_text(f"{content}\n", encoding="utf-8")
    (tmp_path / "sys" / "class" / "drm" / "card1-DP-1").mkdir()
    assert amd_gpus(tmp_path / "sys") == [{"name": "AMD device 0x740c", "memory_bytes": 68702699520, "driver": None}]
    (device / "product_name").write_text("AMD Instinct MI250X\n", encoding="utf-8")
    assert amd_gpus(tmp_path / "sys")[0]["name"] == "AMD Instinct MI250X"


def test_machine_without_gpus_has_none(tmp_path):
    assert nvidia_gpus(tmp_path) == amd_gpus(tmp_path) == []


def test_patches_are_those_that_the_sources_declare(tmp_path):
    declared = {patch["target"]: patch for patch in declared_patches(ROOT / "moreh" / "patches")}
    assert declared[MODULE_CALL.target]["why"] == MODULE_CALL.why
    assert tuple(declared[MODULE_CALL.target]["tested"]) == MODULE_CALL.tested

    (tmp_path / "group.py").write_text(
        "import no_such_module\n"
        "MADE = [registry.Patch(f'torch.{name}', 'because ' 'of it', '-', tested=('torch 2.13',)) for name in NAMES]\n",
        encoding="utf-8",
    )
    assert declared_patches(tmp_path) == [
        {
            "target": "f'torch.{name}'",
            "why": "because of it",
            "no_public_way": "-",
            "tested": ("torch 2.13",),
            "file": "group.py",
        }
    ]
