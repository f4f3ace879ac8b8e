"""Plot the losses of a run."""

from pathlib import Path

import pandas

from ..files import atomic_path
from ..model import require

PANELS = {  # title -> the values of the log
    "training loss": r"^(?!eval_|train_)(.*_)?loss$",
    "validation loss": r"^eval_.*loss$",
    "retrieval": r"recall_at",
    "memory": r"^eval_scope(?!.*loss$)",
    "captions": r"^eval_caption",
    "learning rate": r"^learning_rate$",
    "share of time waiting for data": r"^data_wait$",
    "gradient norm": r"^grad_norm$",
}


def plot_curves(history: list[dict], path: str | Path) -> None:
    """Draw a run's log, `trainer.state.log_history`, into a PNG: a panel per kind of value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    log = pandas.DataFrame(history).set_index("step")
    curves = {title: log.filter(regex=names) for title, names in PANELS.items()}
    curves = {title: lines for title, lines in curves.items() if lines.size}
    require(bool(curves), "the log has nothing to draw.")
    # one axis per panel, at most three in a row
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.2 * rows), squeeze=False)
    for axis, (title, lines) in zip(axes.flat, curves.items()):
        for name in lines:
            points = lines[name].dropna()
            axis.plot(points, marker="." if len(points) < 30 else None, linewidth=1, label=name)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        if len(lines.columns) > 1:
            axis.legend(fontsize=6)
    for axis in list(axes.flat)[len(curves) :]:
        axis.axis("off")
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
