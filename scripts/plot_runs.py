"""The curves of training runs, from their metrics.jsonl, as one picture.

python scripts/plot_runs.py OUTPUT.png RUN [RUN …]"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

#: What is drawn of a run: accuracies, of an ordinary network or at a supernet's extremes.
LINES = {"accuracy": "-", "smallest": "--", "largest": "-"}


def main(output: Path, runs: list[Path]) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="validation accuracy, %")
    axes.grid(alpha=0.3)
    for number, run in enumerate(runs):
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        epochs = [record["epoch"] for record in records]
        for name, style in LINES.items():
            if name in records[0]:
                values = [record[name] for record in records]
                label = run.name if name == "accuracy" else f"{run.name}, {name} sizes"
                axes.plot(epochs, values, f"C{number}{style}", marker=".", label=label)
    axes.legend()
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(run) for run in sys.argv[2:]])
