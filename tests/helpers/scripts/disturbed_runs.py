"""Trainings of train_gpt.py on two workers that tests disturb, and what has to be the same at their end."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil

from tests.conftest import ROOT

# The plan and the precision must not depend on measurements that other programs disturb.
SETTINGS = """
run: {{name: {name}, directory: {directory}/runs, cache_directory: {directory}/cache}}
accelerator: {{workers: 2, advanced_parallelization: {{mixed_precision: false}}}}
model:
  architecture: {{model_type: gpt2, n_layer: 2, n_embd: 32, n_head: 2, n_positions: 64}}
tokenizer: {{vocabulary_size: 300}}
data: {{files: [{directory}/pairs.jsonl], max_length: 48, eval_rows: 8}}
train: {{steps: {steps}, batch_size: 8, lr: 1.0e-3}}
log: {{every_steps: 5, eval_every_steps: 10, sample_tokens: 0}}
checkpoint: {{every_steps: 4, every_minutes: null, keep_last: 3}}
launch: {{hang_seconds: 10}}
stop: {{grace_seconds: 60}}
"""
# Metrics that a run repeats bit for bit.
EXACT = ("step", "loss", "eval_loss", "lr", "grad_norm")


class DisturbedRun:
    """The settings, data and state of a run in a directory."""

    def __init__(self, directory: Path, name: str, steps: int) -> None:
        self.directory, self.run = directory, directory / "runs" / name
        self.begun_at = 0
        self.config = directory / f"{name}.yaml"
        self.environment = {
            **os.environ,
            "MOREH_STATE_DIR": str(directory / "state"),
            "TMPDIR": str(directory / "tmp"),
            "OMP_NUM_THREADS": "1",
            "GOMP_SPINCOUNT": "1000",
            "HF_HUB_OFFLINE": "1",
        }
        self.environment.pop("MOREH_WORKERS", None)
        (directory / "tmp").mkdir(parents=True, exist_ok=True)
        rows = [
            {"prompt": f"def add_{i}(x):\n", "response": f"    return x{' + 1' * (i % 7)} + {i}\n"} for i in range(60)
        ]
        (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.config.write_text(SETTINGS.format(name=name, directory=directory, steps=steps), encoding="utf-8")
        keep_profiles(directory / "state")

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        """Start the script with its output in `console.log`, in a session of its own as in a terminal."""
        self.begun_at = len(self.console())  # characters of the console that are of earlier starts
        with (self.directory / "console.log").open("ab") as console:
            return subprocess.Popen(
                [sys.executable, ROOT / "train_gpt.py", "--config", self.config, *arguments],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
                **options,
            )

    def console(self) -> str:
        """The output of the processes until now."""
        path = self.directory / "console.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, the newest last."""
        found = (self.run / "checkpoints").glob("step-*")
        return sorted((path for path in found if path.name[5:].isdecimal()), key=lambda path: int(path.name[5:]))

    def metrics(self) -> list[dict]:
        """The metrics of the steps that a run repeats bit for bit."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [{key: row.get(key) for key in EXACT} for row in map(json.loads, lines)]

    def weights(self) -> dict[str, bytes]:
        """The files of the final model, by name."""
        return {path.name: path.read_bytes() for path in sorted((self.run / "model").glob("*.safetensors"))}

    def differences(self, expected: "DisturbedRun") -> list[str]:
        """The differences from an undisturbed run; empty if there are none."""
        problems = [
            f"{actual} instead of {wanted}"
            for actual, wanted in zip(self.metrics(), expected.metrics(), strict=False)
            if actual != wanted
        ]
        if len(self.metrics()) != len(expected.metrics()):
            problems.append(f"{len(self.metrics())} lines of metrics instead of {len(expected.metrics())}")
        if self.weights() != expected.weights() or not self.weights():
            problems.append("other weights")
        return problems

    def leftovers(self) -> list[str]:
        """Processes and files that should not be there after a run has ended."""
        return [
            *(f"process {process.pid}" for process in self.processes()),
            *map(str, self.run.rglob("*unfinished*")),
            *map(str, (self.directory / "tmp").glob("moreh-*")),
        ]

    def processes(self) -> list[psutil.Process]:
        """The processes that use the state of this run."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("MOREH_STATE_DIR") == self.environment["MOREH_STATE_DIR"]:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def workers(self) -> dict[int, psutil.Process]:
        """The workers that are running, by rank."""
        found = {}
        for process in self.processes():
            try:
                rank = process.environ().get("RANK")
                if rank is not None and process.environ().get("MOREH_LAUNCHER") == str(process.ppid()):
                    found[int(rank)] = process
            except psutil.Error:
                continue
        return found


def keep_profiles(state: Path) -> None:
    """Write made-up profiles of this machine to a state directory."""
    from moreh.planner.hardware.local_profile import keep_profile
    from tests.helpers.planner.synthetic_profile import synthetic_profile

    state.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("MOREH_STATE_DIR")
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ |= {"MOREH_STATE_DIR": str(state), "OMP_NUM_THREADS": "1"}
    try:
        for workers in (1, 2):
            keep_profile(replace(synthetic_profile(workers), memory_mib=8 * 1024 // workers))
    finally:
        for name, value in (("MOREH_STATE_DIR", before), ("OMP_NUM_THREADS", threads)):
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def kill_all(run: DisturbedRun) -> None:
    """End what is left of a run."""
    for process in run.processes():
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.Error:
            continue
