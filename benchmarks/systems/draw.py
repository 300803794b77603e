"""Draw the tables of compare_systems.py: label tokens per second and peak memory of each system and workload.

python benchmarks/systems/draw.py benchmarks/data/systems.md benchmarks/data/systems.png
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
    """A row of a table."""

    system: str
    """The name of the system."""
    tokens_per_s: float
    """Label tokens per second."""
    memory_gib: float
    """Peak memory in GiB."""


def read_tables(text: str) -> dict[str, list[Row]]:
    """The tables that compare_systems.py has printed, by the name of the workload."""
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
    """Write the picture: a row of two bar charts for each workload."""
    heights = [len(rows) for rows in tables.values()]
    figure, all_axes = pyplot.subplots(
        len(tables), 2, figsize=(11, 0.32 * sum(heights) + 1.2 * len(tables)), height_ratios=heights, squeeze=False
    )
    for (title, rows), (speed, memory) in zip(tables.items(), all_axes, strict=True):
        rows = sorted(rows, key=lambda row: row.tokens_per_s)
        names = [row.system for row in rows]
        colors = ["tab:orange" if row.system == LINE else "tab:blue" for row in rows]
        for axes, values, label, number_format in (
            (speed, [row.tokens_per_s for row in rows], "label tokens/s", "{:,.0f}"),
            (memory, [row.memory_gib for row in rows], "peak memory, GiB", "{:.2f}"),
        ):
            axes.bar_label(axes.barh(names, values, color=colors), fmt=number_format, padding=3)
            axes.set_xlim(0, 1.15 * max(values))
            axes.set_title(f"{title}: {label}", fontsize="medium")
            axes.spines[["top", "right"]].set_visible(False)
        memory.set_yticklabels([])
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Draw the tables of a file."""
    if len(sys.argv) != 3:
        sys.exit(f"two arguments are needed, {len(sys.argv) - 1} given; usage:\n{__doc__}")
    tables = read_tables(Path(sys.argv[1]).read_text())
    if not tables:
        sys.exit(f"{sys.argv[1]}: there is no table of compare_systems.py in it")
    draw(tables, Path(sys.argv[2]))


if __name__ == "__main__":
    main()
