"""The workload that each system of the comparison gets, and the record that it writes.

Needs nothing but torch, since it is imported in the environments of all systems. A workload is a directory:

workload.json   sizes, steps and settings
rows.pt         the rows of all steps in their order, and those that are held out
model/          the model to start from, as transformers saves it
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

# The label of a token that is not learned.
IGNORED = -100
# Token ids, and the length of the prompt, which has no labels.
Row = tuple[list[int], int]


@dataclass(frozen=True)
class Workload:
    """The training of a system."""

    directory: Path
    """The directory of the workload."""
    name: str
    """The workload's name in the tables."""
    batch_size: int
    """Rows of a step."""
    max_length: int
    """Tokens of the longest row that is allowed; the plain loop pads to it."""
    steps: int
    """Optimizer steps."""
    lr: float
    """The learning rate, which is constant."""
    weight_decay: float
    """AdamW's weight decay."""
    pad_id: int
    """The id of the pad token."""
    rows: list[Row]
    """The rows of all steps, in their order."""
    held_out: list[Row]
    """The rows of the evaluation after the last step."""
    lora_rank: int = 0
    """The rank of LoRA adapters, which alone are trained; 0: all weights are trained."""

    @property
    def model(self) -> str:
        """The directory of the model to start from."""
        return str(self.directory / "model")

    def batches(self) -> list[list[Row]]:
        """The rows of each step."""
        return [self.rows[i * self.batch_size : (i + 1) * self.batch_size] for i in range(self.steps)]


def read_workload(directory: str) -> Workload:
    """Read a workload from its directory."""
    path = Path(directory)
    rows = torch.load(path / "rows.pt")
    return Workload(directory=path, **json.loads((path / "workload.json").read_text()), **rows)


def write_workload(workload: Workload) -> None:
    """Write a workload to its directory, without the model, which is already there."""
    fields = {key: value for key, value in vars(workload).items() if key not in ("directory", "rows", "held_out")}
    workload.directory.mkdir(parents=True, exist_ok=True)
    (workload.directory / "workload.json").write_text(json.dumps(fields))
    torch.save({"rows": workload.rows, "held_out": workload.held_out}, workload.directory / "rows.pt")


def make_labels(row: Row) -> list[int]:
    """The labels of a row: the ids after the prompt."""
    ids, prompt_length = row
    return [IGNORED] * prompt_length + ids[prompt_length:]


def pad_rows(rows: list[Row], length: int, pad_id: int) -> dict[str, torch.Tensor]:
    """Ids, attention mask and labels, `[batch, length]` int64, padded on the right."""
    input_ids = torch.full((len(rows), length), pad_id)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORED)
    for index, row in enumerate(rows):
        seq_len = len(row[0])
        input_ids[index, :seq_len] = torch.tensor(row[0])
        attention_mask[index, :seq_len] = 1
        labels[index, :seq_len] = torch.tensor(make_labels(row))
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@dataclass
class Record:
    """The figures of a run."""

    losses: list[float]
    """The loss of each step."""
    seconds: list[float]
    """The time of each step."""
    label_tokens: list[int]
    """The label tokens of each step."""
    first_step_s: float = 0.0
    """Seconds from the start of the command to the end of the first step."""
    peak_bytes: int = 0
    """The peak resident set of the process."""
    held_out_loss: float = float("nan")
    """The loss on the held-out rows after the last step."""

    def log_step(self, loss: float, seconds: float, label_tokens: int) -> None:
        """Add a step."""
        if not self.seconds:
            self.first_step_s = time.time() - float(os.environ["BENCHMARK_STARTED"])
        self.losses.append(loss)
        self.seconds.append(seconds)
        self.label_tokens.append(label_tokens)

    def write(self) -> None:
        """Write the record where the comparison looks for it, with the peak memory of this process so far."""
        status = Path("/proc/self/status").read_text()
        self.peak_bytes = int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024
        Path(os.environ["BENCHMARK_RECORD"]).write_text(json.dumps(asdict(self)))


def count_labels(rows: list[Row]) -> int:
    """The number of tokens that a loss is computed for: nothing predicts the first token of a row."""
    return sum(len(ids) - max(prompt_length, 1) for ids, prompt_length in rows)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, workload: Workload) -> float:
    """The mean loss over all held-out label tokens, of a model that is called like those of transformers."""
    model.eval()
    loss_sum, label_tokens = 0.0, 0
    for row in workload.held_out:
        count = count_labels([row])
        if count:
            batch = pad_rows([row], len(row[0]), workload.pad_id)
            loss_sum += float(model(input_ids=batch["input_ids"], labels=batch["labels"]).loss) * count
            label_tokens += count
    return loss_sum / label_tokens
