"""What the tests of moreh-plan share: a small model, a training step, and running the tool in this process."""

import json
import sys

from moreh.cli import plan_command as tool

MODEL = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 12,
    "vocab_size": 4000,
}
MODEL |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256}
STEP = ("--batch-size", "48", "--sequence-length", "128")
LLAMA = (
    "configs/models/llama3_70b.json",
    "--accelerator",
    "8xLarge.4096GB",
    "--batch-size",
    "512",
    "--sequence-length",
    "1024",
)


def write_model(directory):
    """The path of the small model's configuration."""
    path = directory / "small.json"
    path.write_text(json.dumps(MODEL), encoding="utf-8")
    return str(path)


def runner(monkeypatch, capsys):
    """A function that runs the tool; it returns the exit code and what was written on both streams."""

    def run_tool(*arguments):
        monkeypatch.setattr(sys, "argv", ["moreh-plan", *map(str, arguments)])
        try:
            code = tool.main()
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return run_tool
