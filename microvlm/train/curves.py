"""Plot the losses of a run."""

import os
from pathlib import Path


def plot_curves(history: list[dict], path: str | Path) -> None:
    """Draw a run's log into a PNG, a panel per kind of value.

    Args:
        history: `trainer.state.log_history`.
        path: of the file.

    Raises:
        ValueError: the log has nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = panels(history)
    if not curves:
        raise ValueError("the log has nothing to draw.")
    # one axis per panel, at most three in a row
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.2 * rows), squeeze=False)
    for axis, (title, lines) in zip(axes.flat, curves.items()):
        for name, points in lines.items():
            steps, values = zip(*points)
            axis.plot(steps, values, marker="." if len(points) < 30 else None, linewidth=1, label=name)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        if len(lines) > 1:
            axis.legend(fontsize=6)
    for axis in list(axes.flat)[len(curves) :]:
        axis.axis("off")
    # write under another name and rename
    figure.tight_layout()
    temporary = Path(path).with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    os.replace(temporary, path)


def panels(history: list[dict]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Sort a log into panels of curves, lists of steps and values."""
    keys = sorted({key for entry in history for key in entry})
    losses = [k for k in keys if (k == "loss" or k.endswith("_loss")) and not k.startswith(("eval_", "train_"))]
    names = {
        "training loss": losses,
        "validation loss": [k for k in keys if k.startswith("eval_") and k.endswith("loss")],
        "retrieval": [k for k in keys if "recall_at" in k],
        "memory": [k for k in keys if k.startswith("eval_scope") and not k.endswith("loss")],
        "captions": [k for k in keys if k.startswith("eval_caption")],
        "learning rate": ["learning_rate"],
        "share of time waiting for data": ["data_wait"],
        "gradient norm": ["grad_norm"],
    }
    curves = {
        title: {k: points for k in chosen if (points := [(e["step"], e[k]) for e in history if k in e])}
        for title, chosen in names.items()
    }
    return {title: lines for title, lines in curves.items() if lines}
