"""The command: `python benchmarks/gpu_check [--dry] [--smoke] [--only PART ...] [--out DIRECTORY]`."""

import argparse
import contextlib
import datetime
import gc
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Nothing is installed: the packages are those of the checkout.
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_check.isolation import Isolation, Part  # noqa: E402
from gpu_check.plan import BUDGET_S, SMOKE_BUDGET_S, full_check, in_turns, smoke_check  # noqa: E402
from gpu_check.report import Report  # noqa: E402
from gpu_check.settings import DRY, SCRATCH  # noqa: E402

STAND_INS = ROOT / "benchmarks/gpu_check/stand_ins"
# Asked in a process of its own: this one must not start CUDA.
_HAS_GPU = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"


def main() -> int:
    """Run the parts; returns the number of cases that failed, at most 1."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="the same code with tiny sizes on the CPU")
    parser.add_argument("--smoke", action="store_true", help="the check of a minute and a half")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="only parts whose names begin so")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check"), help="where the report is written")
    options = parser.parse_args()
    started = time.monotonic()
    parts = [
        part
        for part in (smoke_check() if options.smoke else full_check(dry=options.dry))
        if not options.only or any(part.name.startswith(name) for name in options.only)
    ]
    if not parts:
        parser.error(
            f"--only {' '.join(options.only)}: the parts are {', '.join(part.name for part in full_check(dry=False))}"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        environment = _environment(Path(scratch), dry=options.dry)
        if not options.dry and subprocess.run([sys.executable, "-c", _HAS_GPU], env=environment).returncode != 0:
            print("torch sees no GPU, so there is nothing to check; --dry runs the same code on the CPU")
            return 2
        about = {
            "command": f"python benchmarks/gpu_check {' '.join(sys.argv[1:])}".strip(),
            "commit": _commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "dry": options.dry,
        }
        report = Report(options.out, about)
        deadline = started + (float("inf") if options.dry else SMOKE_BUDGET_S if options.smoke else BUDGET_S)
        if options.dry:
            _import_libraries(environment)
        isolation = Isolation(Path(scratch), environment, fork=options.dry)

        def run(part: Part) -> None:
            print(f"--- {part.title} ({time.monotonic() - started:.0f} s)", flush=True)
            for record in isolation.run(part, deadline):
                report.add(part, record)

        # Copies of this process are made from its main thread only.
        for group in [[part] for part in parts] if options.dry else in_turns(parts):
            if len(group) == 1:
                run(group[0])
            else:
                with ThreadPoolExecutor(len(group)) as threads:
                    list(threads.map(run, group))
    about["seconds"] = round(time.monotonic() - started)
    report.write()
    counts = report.counts()
    words = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"{words} in {about['seconds']} s. The tables: {options.out / 'gpu-check.md'}")
    return 1 if counts["failed"] else 0


def _environment(scratch: Path, *, dry: bool) -> dict[str, str]:
    """The environment of the parts' processes."""
    paths = [str(ROOT), str(ROOT / "benchmarks")]
    if importlib.util.find_spec("psutil") is None:
        paths.append(str(STAND_INS))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        DRY: "1" if dry else "0",
        SCRATCH: str(scratch),
        # One GPU is checked, and one worker computes unless a part says otherwise.
        "CUDA_VISIBLE_DEVICES": "" if dry else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        "MOREH_WORKERS": "1",
        "MOREH_PLATFORM_LINES": "0",
        "MOREH_CUDA_FACE": "0",
        "HF_HUB_OFFLINE": "1",
        # Of several processes, each would compute with all cores; and compiling takes longer than everything else.
        **({"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"} if dry else {}),
    }
    environment.pop("MOREH_ENABLE_ADVANCED_PARALLELIZATION", None)
    return environment


def _import_libraries(environment: dict[str, str]) -> None:
    """Import slow libraries before the dry mode forks the parts."""
    os.environ.update(environment)
    import torch  # noqa: F401
    from transformers import GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401

    import moreh.runtime.engine.checkpoint_api
    import moreh.runtime.engine.fast_path
    import moreh.runtime.engine.hook
    import moreh.runtime.engine.multi_worker_hook  # noqa: F401

    with contextlib.suppress(ImportError):  # it needs accelerate
        import transformers.trainer  # noqa: F401
    gc.freeze()  # the copies collect what they make themselves


def _commit() -> str:
    """The commit of the checkout; "unknown" without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return finished.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
