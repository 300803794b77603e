"""The HTML page of the report, self-contained.

All text goes through `_text`. What a model writes, a setting or an error may look like HTML.
"""

import math
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from moreh.planner.units import GIB, gib, seconds_text
from utils.report.chart import Chart, Line, chart_html
from utils.report.curves import RECENT, ROUGE_NAMES, RunCurves
from utils.report.run_state import RUNNING, RunState
from utils.report.timeline import timeline_html

# Above this loss, which no trained model has, a perplexity is a number of many digits.
MAX_PERPLEXITY_LOSS = 20
_HERE = Path(__file__).parent
# A browser that opens the page loads nothing from elsewhere, even if the page's texts contain HTML.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Report:
    """The content of a report."""

    name: str
    """The name of the run."""
    state: RunState
    """Metadata of the run."""
    curves: RunCurves
    """The run's metrics."""
    settings: str
    """The run's config.yaml."""
    renewed: float
    """The time of the report, in seconds since the epoch."""


def page_html(report: Report) -> str:
    """The page of a report."""
    state = report.state
    detail = f" <span>{_text(state.detail)}</span>" if state.detail else ""
    parts = [
        f"<header><h1>{_text(report.name)}</h1><span class='status {_text(state.status)}'>{_text(state.status)}</span>"
        f"</header>{detail}",
        _progress(report),
        _tiles(report),
        _charts(report),
        _plans(report),
        _simulated(report),
        _samples(state),
        _details("Settings", f"<pre>{_text(report.settings)}</pre>", "config.yaml of the run, defaults included"),
        _details("Environment", _environment(state), ""),
    ]
    renewed = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(report.renewed))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(report.name)}: '
        f'{_text(state.status)}</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><style>{_read("style.css")}</style></head>\n'
        f'<body data-status="{_text(state.status)}">{"".join(parts)}\n<footer><p>Renewed '
        f'<span id=renewed data-time="{report.renewed:.0f}">{renewed}</span></p></footer>'
        f"<script>{_read('script.js')}</script></body></html>\n"
    )


def _progress(report: Report) -> str:
    total = report.state.total_steps
    return f'<progress max="{total}" value="{report.curves.last_step}"></progress>' if total else ""


def _tiles(report: Report) -> str:
    """The figures that one looks for first."""
    state, curves = report.state, report.curves
    loss, held_out, speed = curves["loss"], curves["eval_loss"], curves["real_tokens_per_s"]
    step = f"{curves.last_step:,}" + (f" of {state.total_steps:,}" if state.total_steps else "")
    tiles = [("step", step), ("loss", _figure(loss.last)), ("held-out loss, before", _figure(held_out.first))]
    if len(held_out.points) > 1:
        tiles += [("held-out loss, last", _figure(held_out.last)), ("held-out perplexity", _perplexity(held_out.last))]
    if speed.points:
        tiles.append(("tokens/s, without padding", f"{_median(speed.recent):,.0f}"))
    elapsed = (state.ended or report.renewed) - state.started
    tiles.append(("since it was resumed" if state.first_step else "time", _duration(elapsed)))
    done = curves.last_step - state.first_step
    if state.status == RUNNING and state.total_steps and done > 0:
        tiles.append(("time left", _duration(elapsed / done * (state.total_steps - curves.last_step))))
    shown = "".join(f"<div><b>{_text(value)}</b><span>{_text(name)}</span></div>" for name, value in tiles if value)
    return f"<div class=tiles>{shown}</div>"


def _charts(report: Report) -> str:
    """The curves that were measured."""
    curves = report.curves
    charts = [
        Chart(
            "Loss",
            "nats per label token",
            [Line("training", curves["loss"]), Line("held-out", curves["eval_loss"], has_dots=True)],
            from_zero=False,
        ),
        Chart("Learning rate", "after warm-up and decay", [Line("learning rate", curves["lr"])]),
        Chart("Gradient norm", "before clipping", [Line("norm", curves["grad_norm"])], may_be_log=True),
        Chart(
            "Tokens/s",
            "without evaluation and checkpoints",
            [
                Line("real, without padding", curves["real_tokens_per_s"]),
                Line("with a label", curves["label_tokens_per_s"]),
            ],
        ),
        Chart("Step time", "seconds", [Line("step", curves["step_s"])], may_be_log=True),
        Chart("Memory", "GiB, of the first worker", [Line("in use", curves["memory_in_use_bytes"], GIB)]),
    ]
    rouge = [Line(name, curves[key], has_dots=True) for key, name in ROUGE_NAMES.items()]
    charts.append(Chart("ROUGE", "F1 of generated responses", rouge))
    passed = Line("functions whose examples pass", curves["examples_passed"], has_dots=True)
    charts.append(Chart("Docstring examples", "share of the functions", [passed]))
    if not report.state.is_simulated:
        charts.append(Chart("Allocated memory", "GiB, the most until then", [_allocated(curves)]))
    drawn = "".join(chart_html(chart, curves.last_step) for chart in charts)
    return f"<h2>Measured</h2><div class=charts>{drawn}</div>" if drawn else "<p>No step is done yet.</p>"


def _allocated(curves: RunCurves) -> Line:
    return Line("allocated", curves["memory_bytes"], GIB)


def _plans(report: Report) -> str:
    """The plans for this machine, and the measured figures below them."""
    plans = [plan for plan in report.state.plans if not plan["simulated"]]
    if not plans:
        return ""
    times, memory = report.curves["step_s"].recent, report.curves["memory_in_use_bytes"].last
    measured = [
        "measured",
        f"median of the last {RECENT} steps" if len(times) == RECENT else f"median of {len(times)} steps",
        "",
        seconds_text(_median(times)) if times else "",
        "" if math.isnan(memory) else gib(memory),
    ]
    several = report.state.batches_per_step
    batches = f", of which a step has {several:,}" if several > 1 else ""
    note = f"<p class=note>Predictions are for one batch whose rows have no padding{batches}.</p>"
    timelines = "".join(timeline_html(plan) for plan in plans)
    return f"<h2>Plan: predicted and measured</h2>{_plan_table(plans, [measured])}{note}{timelines}"


def _simulated(report: Report) -> str:
    """A note on figures of devices that the machine does not have."""
    if not report.state.is_simulated:
        return ""
    plans = [plan for plan in report.state.plans if plan["simulated"]]
    memory = Chart("Memory (simulated)", "GiB, on all simulated devices", [_allocated(report.curves)])
    timelines = "".join(timeline_html(plan) for plan in plans)
    content = (_plan_table(plans, []) if plans else "") + timelines + chart_html(memory, report.curves.last_step)
    if not content:
        return ""
    note = "<p class=note>Nothing here was measured: these are predictions for devices that the machine lacks.</p>"
    return f"<section class=simulated><h2>Simulated accelerator</h2>{note}{content}</section>"


def _plan_table(plans: Iterable[Mapping[str, Any]], more: Iterable[list[str]]) -> str:
    rows = [
        [
            f"{'simulated' if plan['simulated'] else 'predicted'} for {plan['devices']}",
            plan["plan"],
            f"{plan['batch_size']:,} x {plan['sequence_length']:,}",
            seconds_text(plan["step_time_s"]),
            gib(plan["memory_bytes"]),
        ]
        for plan in plans
    ]
    names = ("", "plan", "rows x tokens", "step", "memory of a device")
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(
        f"<tr><th>{_text(row[0])}</th>"
        + "".join(f'<td data-name="{name}">{_text(cell)}</td>' for name, cell in zip(names[1:], row[1:], strict=True))
        + "</tr>"
        for row in [*rows, *more]
    )
    return f"<table class=plans><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _samples(state: RunState) -> str:
    """The model's samples before the training and at the last evaluation."""
    if not state.samples:
        return ""
    shown = "".join(
        f"<figure><figcaption><b>After step {sample.step:,}</b></figcaption><pre>{_text(sample.text)}</pre></figure>"
        if sample.step
        else f"<figure><figcaption><b>Before the training</b></figcaption><pre>{_text(sample.text)}</pre></figure>"
        for sample in state.samples
    )
    return f"<h2>Sample</h2><div class=pair>{shown}</div>"


def _environment(state: RunState) -> str:
    rows = {"command": state.command, **state.environment}
    body = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows.items() if value)
    return f"<table><tbody>{body}</tbody></table>"


def _details(title: str, content: str, note: str) -> str:
    return f"<h2>{title}</h2><details><summary>{note or 'show'}</summary>{content}</details>"


def _figure(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3g}"


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.1f}" if loss < MAX_PERPLEXITY_LOSS else ""


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _duration(seconds: float) -> str:
    """A duration as "45 s", "12 min" or "3 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{max(seconds, 0):.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def _text(value: object) -> str:
    """A text in HTML. What is not a character of a page, such as half a surrogate pair, is shown as a replacement."""
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return escape("".join(c if c in "\n\t" or (ord(c) >= 32 and ord(c) != 127) else "\ufffd" for c in text))


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8").strip()
