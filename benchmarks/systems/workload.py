"""A workload as every system of the comparison gets it, and what each leaves behind. Needs torch and the standard library only.

directory/workload.json   sizes and steps
directory/rows.pt         the rows of all steps in their order, then those that are held out
directory/model/          the model to start from, as transformers saves it
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

IGNORED = -100


@dataclass(frozen=True)
class Workload:
    """`rows` and `held_out` have ids and the length of the prompt, which has no loss; batches are rows in their order."""

    directory: Path
    name: str
    batch_size: int
    max_length: int
    steps: int
    lr: float
    weight_decay: float
    pad_id: int
    rows: list[tuple[list[int], int]]
    held_out: list[tuple[list[int], int]]

    @property
    def model(self) -> str:
        """The directory of the model to start from."""
        return str(self.directory / "model")

    def batches(self) -> list[list[tuple[list[int], int]]]:
        """The rows of each step."""
        return [self.rows[i * self.batch_size : (i + 1) * self.batch_size] for i in range(self.steps)]


def read_workload(directory: str) -> Workload:
    """The workload in a directory."""
    path = Path(directory)
    rows = torch.load(path / "rows.pt")
    return Workload(directory=path, **json.loads((path / "workload.json").read_text()), **rows)


def write_workload(workload: Workload) -> None:
    """The opposite; the model is saved by whoever makes it."""
    fields = {k: v for k, v in vars(workload).items() if k not in ("directory", "rows", "held_out")}
    workload.directory.mkdir(parents=True, exist_ok=True)
    (workload.directory / "workload.json").write_text(json.dumps(fields))
    torch.save({"rows": workload.rows, "held_out": workload.held_out}, workload.directory / "rows.pt")


def make_labels(row: tuple[list[int], int]) -> list[int]:
    """The labels of a row: its ids behind the prompt."""
    ids, prompt = row
    return [IGNORED] * prompt + ids[prompt:]


def padded(rows: list[tuple[list[int], int]], length: int, pad_id: int) -> dict[str, torch.Tensor]:
    """Ids, mask and labels `[rows, length]` int64, padded on the right."""
    ids = torch.full((len(rows), length), pad_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for number, row in enumerate(rows):
        size = len(row[0])
        ids[number, :size] = torch.tensor(row[0])
        mask[number, :size] = 1
        labels[number, :size] = torch.tensor(make_labels(row))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass
class Record:
    """What a run leaves behind. `first_step_s` is from the start of the command to the end of the first step."""

    losses: list[float]
    seconds: list[float]
    label_tokens: list[int]
    first_step_s: float = 0.0
    peak_bytes: int = 0
    held_out_loss: float = float("nan")

    def log_step(self, loss: float, seconds: float, label_tokens: int) -> None:
        """Note a step."""
        if not self.seconds:
            self.first_step_s = time.time() - float(os.environ["BENCHMARK_STARTED"])
        self.losses.append(loss)
        self.seconds.append(seconds)
        self.label_tokens.append(label_tokens)

    def write(self) -> None:
        """Write it where the comparison looks for it, with the peak of this process's memory so far."""
        status = Path("/proc/self/status").read_text()
        self.peak_bytes = int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024
        Path(os.environ["BENCHMARK_RECORD"]).write_text(json.dumps(asdict(self)))


def label_count(rows: list[tuple[list[int], int]]) -> int:
    """Tokens that a loss is computed for: the first token of a row is predicted by nothing."""
    return sum(len(ids) - max(prompt, 1) for ids, prompt in rows)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, workload: Workload) -> float:
    """The mean loss over the label tokens that are held out, of a model that is called as transformers' are."""
    model.eval()
    total, tokens = 0.0, 0
    for row in workload.held_out:
        count = label_count([row])
        if count:
            batch = padded([row], len(row[0]), workload.pad_id)
            total += float(model(input_ids=batch["input_ids"], labels=batch["labels"]).loss) * count
            tokens += count
    return total / tokens
