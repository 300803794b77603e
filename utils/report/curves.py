"""The metrics of a run as curves with a bounded number of points.

A curve takes values one by one, so a report of a long run costs what a report of a short one costs. The same values
give the same points, whether they come from the run or from its metrics.jsonl.
"""

import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

# The most points of a curve: about one for each pixel of a chart. An even number, since points are joined in pairs.
MAX_POINTS = 400
# The steps whose median says how fast the run is now.
RECENT = 100
# Metrics of evaluations that generate responses, by their names in rouge-score: one word, two in a row, and the longest
# common sequence of words.
ROUGE_NAMES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


@dataclass(slots=True)
class Point:
    """The values of some consecutive steps. It changes as it takes values, of which a long run has millions."""

    first_step: float
    """The first of the steps."""
    last_step: float
    """The last of the steps."""
    count: int
    """The number of values."""
    total: float
    """The sum of the values."""
    low: float
    """The smallest value."""
    high: float
    """The largest value."""

    @property
    def mean(self) -> float:
        """The mean of the values; the middle of the range where their sum is beyond the largest number."""
        mean = self.total / self.count
        return mean if math.isfinite(mean) else self.low / 2 + self.high / 2

    def take(self, later: "Point") -> None:
        """Take the values of the steps that follow."""
        self.last_step = later.last_step
        self.count += later.count
        self.total += later.total
        self.low = min(self.low, later.low)
        self.high = max(self.high, later.high)


class Curve:
    """The values of one metric over the steps, in at most `MAX_POINTS` points."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        """The points; each but the last has the same number of values."""
        self.recent: deque[float] = deque(maxlen=RECENT)
        """The last values."""
        self.first = self.last = math.nan
        """The first and the last value that are finite."""
        self.count_before_recent = 0
        """Number of finite values before those of `recent`."""
        self.not_finite = 0
        """Number of NaN or infinite values. They are in no point."""
        self.first_not_finite_step: float | None = None
        """The step of the first of those values."""
        self._values_per_point = 1

    def add(self, step: float, value: float) -> None:
        """Take the value of the next step."""
        if not math.isfinite(value):
            self.not_finite += 1
            if self.first_not_finite_step is None:
                self.first_not_finite_step = step
            return
        self.last = value
        if math.isnan(self.first):
            self.first = value
        self.count_before_recent += len(self.recent) == self.recent.maxlen
        self.recent.append(value)
        point = Point(step, step, 1, value, value, value)
        if self.points and self.points[-1].count < self._values_per_point:
            self.points[-1].take(point)
            return
        if len(self.points) == MAX_POINTS:
            for earlier, later in zip(self.points[::2], self.points[1::2], strict=True):
                earlier.take(later)
            del self.points[1::2]
            self._values_per_point *= 2
        self.points.append(point)


class RunCurves:
    """The curves of all metrics of a run."""

    def __init__(self) -> None:
        self.by_key: dict[str, Curve] = {}
        """The curve of each metric."""
        self.last_step = 0
        """The last step that has metrics."""

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of the next step. What is not a number, as another program may have written, is left out."""
        step = metrics.get("step")
        if not _is_number(step) or not math.isfinite(step):
            return
        self.last_step = max(self.last_step, int(step))
        for key, value in metrics.items():
            if key != "step" and _is_number(value):
                self.by_key.setdefault(key, Curve()).add(step, float(value))

    def __getitem__(self, key: str) -> Curve:
        """The curve of a metric, without points if no step has had it."""
        return self.by_key.get(key, Curve())


def read_curves(metrics: Path) -> RunCurves:
    """The curves of a metrics.jsonl file. A line that a killed run has left half written is passed over."""
    curves = RunCurves()
    if not metrics.exists():
        return curves
    with metrics.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(content, dict):
                curves.add(content)
    return curves


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
