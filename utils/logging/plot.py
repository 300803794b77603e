"""Draws the loss curves of a run."""

import json
from pathlib import Path

from moreh.planner.report.figures import new_figure


def draw_losses(metrics: Path, picture: Path) -> Path:
    """Draw the training and held-out losses of a metrics.jsonl file over the steps, as a PNG; returns its path."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure = new_figure(figsize=(8, 5), dpi=120)
    axes = figure.subplots()
    for key, label, style in (("loss", "training", {"linewidth": 0.8}), ("eval_loss", "held-out", {"marker": "o"})):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per label token)")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    figure.tight_layout()
    figure.savefig(picture)
    return picture
