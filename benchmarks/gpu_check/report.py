"""The records of a check as JSON, and as tables in Markdown: written again after each record."""

import json
import threading
from pathlib import Path
from typing import Any

from gpu_check.isolation import Part, Record


class Report:
    """The records so far, and the files that have them."""

    def __init__(self, directory: Path, about: dict[str, Any]) -> None:
        self._directory = directory
        self._about = about
        self._lock = threading.Lock()
        self._records: list[tuple[Part, Record]] = []

    def add(self, part: Part, record: Record) -> None:
        """Print a record, and write both files."""
        with self._lock:
            self._add(part, record)

    def _add(self, part: Part, record: Record) -> None:
        self._records.append((part, record))
        figures = "; ".join(f"{name} {shown(value)}" for name, value in record.get("figures", {}).items())
        words = [record["status"], f"{part.name} {record['case']}:", figures, record.get("reason", "")]
        print(" ".join(word for word in words if word), flush=True)
        self.write()

    def write(self) -> None:
        """Write gpu-check.json and gpu-check.md."""
        records = [{"part": part.name, **record} for part, record in self._records]
        content = {"about": self._about, "records": records}
        (self._directory / "gpu-check.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (self._directory / "gpu-check.md").write_text(self.markdown(), encoding="utf-8")

    def counts(self) -> dict[str, int]:
        """The numbers of cases that passed, failed, and were skipped."""
        statuses = [record["status"] for _, record in self._records]
        return {status: statuses.count(status) for status in ("passed", "failed", "skipped")}

    def markdown(self) -> str:
        """The tables, one for each part."""
        lines = ["# GPU check", ""]
        if self._about.get("dry"):
            lines += ["**Dry mode on the CPU with tiny sizes: no figure here says anything about a GPU.**", ""]
        lines += [f"- {name}: {shown(value)}" for name, value in self._about.items()]
        parts = dict.fromkeys(part for part, _ in self._records)
        for part in parts:
            records = [record for of_part, record in self._records if of_part == part]
            names = list(dict.fromkeys(name for record in records for name in record.get("figures", {})))
            lines += ["", f"## {part.title}", "", f"| case | result | {' | '.join([*names, 'note'])} |"]
            lines.append("|---" * (len(names) + 3) + "|")
            for record in records:
                figures = record.get("figures", {})
                cells = [shown(figures.get(name, "")) for name in names]
                reason = record.get("reason", "").replace("|", "\\|")
                lines.append(f"| {' | '.join([record['case'], record['status'], *cells, reason])} |")
        return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A value of a table, with three digits where it is a fraction."""
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if type(value) is int else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
