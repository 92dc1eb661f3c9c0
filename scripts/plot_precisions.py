"""Quality against milliseconds of a network in several precisions, as one picture.

python scripts/plot_precisions.py OUTPUT.png TABLE.json

The table has, by title of a panel, {"quality": its label, "points": [[label, milliseconds,
quality], …]}. Labels that begin alike, up to the comma, get one colour."""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def main(output: Path, table: Path) -> None:
    panels = json.loads(table.read_text(encoding="utf-8"))
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (title, panel) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.set(title=title, xlabel="milliseconds", ylabel=panel["quality"])
        axes.grid(alpha=0.3)
        colours: dict[str, str] = {}
        for label, milliseconds, quality in panel["points"]:
            colour = colours.setdefault(label.split(",")[0], f"C{len(colours)}")
            axes.plot(milliseconds, quality, "o", color=colour)
            axes.annotate(label, (milliseconds, quality), xytext=(4, 4), fontsize="x-small",
                          textcoords="offset points")  # fmt: skip
        axes.margins(x=0.25, y=0.15)
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
