"""The page of a report: well-formed, without anything from elsewhere, and honest about what was measured."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from utils.report.chart import Chart, Line, chart_html, tick_text, ticks
from utils.report.curves import Curve, RunCurves
from utils.report.page import Report, page_html
from utils.report.run_state import RunState as State
from utils.report.run_state import Sample

VOID = {"meta", "br", "link", "img", "input"}
HOSTILE = '</pre></script><script>alert(1)</script><img src="https://example.com/x" onerror=alert(2)>&lt;"\''
PLAN = {
    "devices": "8 x MI250 GCD",
    "simulated": True,
    "plan": "tp2 pp4 dp1 mb1x8",
    "batch_size": 16,
    "sequence_length": 512,
    "step_time_s": 0.25,
    "memory_bytes": 2**31,
}
PIPELINE = {
    "schedule": "1f1b",
    "ranks": 4,
    "micro_batches": 8,
    "chunks": 1,
    "forward_s": [0.005] * 4,
    "backward_s": [0.01] * 4,
    "weight_fraction": 0.5,
    "send_s": 0.001,
}
DRAWN_PLAN = {**PLAN, "pipeline": PIPELINE}
LOCAL_PLAN = {**PLAN, "devices": "this machine, 1 worker", "simulated": False, "plan": "whole", "step_time_s": 1.5}


class Page(HTMLParser):
    """Reads a page, and refuses one whose elements are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.data, self._open = [], [], [], []
        self.text = ""
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self._open.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if self._open and self._open[-1][0] == "script":
            if self._open[-1][1].get("type") == "application/json":
                self.data.append(json.loads(data, parse_constant=lambda name: pytest.fail(name)))
        elif self._open and self._open[-1][0] != "style":
            self.text += data + "\n"


def curves_of(*steps):
    curves = RunCurves()
    for step in steps:
        curves.add(step)
    return curves


def metrics(step, **changes):
    values = {"loss": 4 - step / 100, "lr": 1e-3, "grad_norm": 1.0, "real_tokens_per_s": 1000.0, "step_s": 0.75}
    return {"step": step, **values, "memory_in_use_bytes": 3 * 2**30, "memory_bytes": 9 * 2**30, **changes}


def page_of(curves, **state):
    text = page_html(Report("mine", State(1000.0, **state), curves, "train: {lr: 0.1}\n", 1060.0))
    return Page(text), text


def test_page_of_a_run_that_has_done_nothing_yet():
    page, _ = page_of(RunCurves())
    assert "No step is done yet." in page.text
    assert "svg" not in page.tags


def test_page_asks_no_network():
    curves = curves_of({"step": 0, "eval_loss": 5.0}, metrics(1), metrics(2, eval_loss=4.0))
    page, text = page_of(curves, is_simulated=True, plans=[DRAWN_PLAN, {**LOCAL_PLAN, "pipeline": PIPELINE}])
    assert text.count("<figure class=timeline>") == 2
    assert not {name for name, _ in page.attributes} & {"src", "href", "srcset", "action", "poster", "background"}
    assert not {"link", "img", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttpRequest|WebSocket", text)
    assert "default-src 'none'" in dict(page.attributes)["content"]


def test_hostile_text_stays_text():
    page, text = page_of(
        curves_of(metrics(1)),
        detail=HOSTILE,
        command=HOSTILE,
        samples=[Sample(0, HOSTILE + "\ud800\x00\x1b[31m"), Sample(1, HOSTILE)],
        environment={HOSTILE: HOSTILE},
        plans=[{**LOCAL_PLAN, "plan": HOSTILE, "devices": HOSTILE}],
        status=HOSTILE,
    )
    assert "<img" not in text
    assert "onerror" not in {name for name, _ in page.attributes}
    plain, _ = page_of(curves_of(metrics(1)), plans=[LOCAL_PLAN], environment={"a": "b"})
    assert page.tags.count("script") == plain.tags.count("script")
    assert page.text.count(HOSTILE) >= 7
    assert not re.search("[\x00\x1b]", text)
    text.encode("utf-8")


def test_hostile_name_of_a_curve_stays_in_its_script():
    curve = Curve()
    curve.add(1, 1.0)
    page = Page(chart_html(Chart("t", "y", [Line(HOSTILE, curve)]), 1))
    assert page.tags.count("script") == 1
    assert page.data[0]["lines"][0]["name"] == HOSTILE


@pytest.mark.parametrize("value", [0.0, 1e-320, -5.0, 1e308, -1.7e308, 3, 123456.789, 1e20])
def test_one_step_gives_a_dot_whatever_its_value(value):
    page, text = page_of(curves_of(metrics(1, loss=value, grad_norm=value, step_s=abs(value))))
    assert 'class="dots c0"' in text
    assert page.data[0]["lines"][0]["points"][0] == [1, pytest.approx(value, rel=1e-4)]
    assert not re.search(r"\bnan\b|\binf\b", text)


def test_values_far_apart_are_drawn():
    page, text = page_of(
        curves_of(metrics(1, grad_norm=1e-300, loss=-1.7e308), metrics(2, grad_norm=1.7e308, loss=1.7e308))
    )
    assert "logarithmic" in page.text
    coordinates = [
        int(number)
        for path in re.findall(r'class="line[^>]* d="([^"]*)"', text)
        for number in re.findall(r"-?\d+", path)
    ]
    assert min(coordinates) >= 0
    assert max(coordinates) <= 1000


def test_values_that_are_not_finite_are_named():
    page, _ = page_of(curves_of(metrics(1), metrics(7, loss=math.nan), metrics(8, loss=math.inf)))
    assert "training: 2 values are not finite, first at step 7" in page.text


def test_long_run_has_a_page_of_bounded_size():
    curves = curve_of_steps = RunCurves()
    for step in range(1, 20_001):
        curve_of_steps.add(metrics(step, loss=math.sin(step), grad_norm=1.5 + math.cos(step)))
    page, text = page_of(curves, total_steps=20_000)
    assert len(text) < 250_000
    assert page.text.count("20,000 of 20,000") == 1
    first = page.data[0]["lines"][0]["points"][0]
    assert first[0] == 1
    assert first[3] < first[2] < first[4]


def test_simulated_figures_are_apart_from_measured_ones():
    page, _ = page_of(curves_of(metrics(1), metrics(2)), is_simulated=True, plans=[PLAN, LOCAL_PLAN])
    measured, simulated = page.text.split("Simulated accelerator\n")
    assert "simulated for 8 x MI250 GCD\ntp2 pp4 dp1 mb1x8\n16 x 512\n250.00 ms\n2.00 GiB" in simulated
    assert "Memory (simulated)" in simulated
    assert not re.search("[Ss]imulated|tp2|Allocated", measured)
    assert "predicted for this machine, 1 worker\nwhole\n16 x 512\n1.50 s\n2.00 GiB" in measured
    assert "measured\nmedian of 2 steps\n750.00 ms\n3.00 GiB" in measured
    [last] = [data for data in page.data if data["lines"][0]["name"] == "allocated"]
    assert last["lines"][0]["points"] == [[1, 9], [2, 9]]
    assert last is page.data[-1]  # of no chart above


def test_figures_of_real_devices_are_called_measured():
    page, _ = page_of(curves_of(metrics(1)), is_simulated=False, plans=[LOCAL_PLAN], batches_per_step=4)
    assert "Simulated" not in page.text
    assert "Allocated memory" in page.text
    assert "one batch whose rows have no padding, of which a step has 4" in page.text


def test_time_left_is_at_the_pace_since_the_run_was_resumed():
    page, _ = page_of(curves_of(metrics(40)), first_step=30, total_steps=50)
    assert "60 s\nsince it was resumed" in page.text
    assert "60 s\ntime left" in page.text
    ended, _ = page_of(curves_of(metrics(40)), first_step=30, total_steps=50, status="stopped", ended=1030.0)
    assert "30 s\nsince it was resumed" in ended.text
    assert "time left" not in ended.text


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 3e-5), (4.6, 8.4), (-1, 1), (0, 123456), (1000, 1007), (0, 1e308)]
)
def test_ticks_are_round_and_inside(low, high):
    places = ticks(low, high)
    assert 2 <= len(places) <= 7
    assert all(low - 1e-9 * abs(high) <= place <= high * (1 + 1e-9) for place in places)
    assert len({tick_text(place) for place in places}) == len(places)
