"""Draw the tables of compare_systems.py: label tokens per second and peak memory of each system, a row for each workload.

python benchmarks/draw_systems.py benchmarks/data/systems.md benchmarks/data/systems.png
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

LINE = "the loop with the line"


@dataclass(frozen=True)
class Row:
    """A system of a table: label tokens per second, peak memory in GiB."""

    system: str
    tokens_per_s: float
    memory_gib: float


def read_tables(text: str) -> dict[str, list[Row]]:
    """The tables that compare_systems.py has printed, by workload."""
    tables: dict[str, list[Row]] = {}
    title = ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            title = line.split(":")[0] or title
        elif not set(cells[1]) <= set("-") and cells[0] != "system":
            tables.setdefault(title, []).append(Row(cells[0], float(cells[1].replace(",", "")), float(cells[4])))
    return tables


def draw(tables: dict[str, list[Row]], path: Path) -> None:
    """Write the picture."""
    heights = [len(rows) for rows in tables.values()]
    figure, places = pyplot.subplots(
        len(tables), 2, figsize=(11, 0.32 * sum(heights) + 1.2 * len(tables)), height_ratios=heights, squeeze=False
    )
    for (title, rows), (speed, memory) in zip(tables.items(), places, strict=True):
        rows = sorted(rows, key=lambda row: row.tokens_per_s)
        names = [row.system for row in rows]
        colors = ["tab:orange" if row.system == LINE else "tab:blue" for row in rows]
        for place, values, label, form in (
            (speed, [row.tokens_per_s for row in rows], "label tokens/s", "{:,.0f}"),
            (memory, [row.memory_gib for row in rows], "peak memory, GiB", "{:.2f}"),
        ):
            place.bar_label(place.barh(names, values, color=colors), fmt=form, padding=3)
            place.set_xlim(0, 1.15 * max(values))
            place.set_title(f"{title}: {label}", fontsize="medium")
            place.spines[["top", "right"]].set_visible(False)
        memory.set_yticklabels([])
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Draw the tables of a file."""
    if len(sys.argv) != 3:
        sys.exit(f"given are {len(sys.argv) - 1} arguments; usage:\n{__doc__}")
    tables = read_tables(Path(sys.argv[1]).read_text())
    if not tables:
        sys.exit(f"{sys.argv[1]}: no table of compare_systems.py is in it")
    draw(tables, Path(sys.argv[2]))


if __name__ == "__main__":
    main()
