"""Plot the losses of a run."""

import os
from pathlib import Path


def plot_curves(history: list[dict], path: str | Path) -> None:
    """Draw a run's log: losses, evaluation losses, retrieval, memory and captions, rate, waiting; into a PNG.

    Args:
        history: `trainer.state.log_history`.
        path: of the file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    keys = sorted({k for entry in history for k in entry})
    train = [k for k in keys if (k == "loss" or k.endswith("_loss")) and not k.startswith(("eval_", "train_"))]
    panels = {
        "training loss": train,
        "validation loss": [k for k in keys if k.startswith("eval_") and k.endswith("loss")],
        "retrieval": [k for k in keys if "recall_at" in k],
        "memory": [k for k in keys if k.startswith("eval_scope") and not k.endswith("loss")],
        "captions": [k for k in keys if k.startswith("eval_caption")],
        "learning rate": ["learning_rate"],
        "share of time waiting for data": ["data_wait"],
        "gradient norm": ["grad_norm"],
    }
    curves = {
        title: {k: [(e["step"], e[k]) for e in history if k in e] for k in names} for title, names in panels.items()
    }
    curves = {title: {k: v for k, v in lines.items() if v} for title, lines in curves.items()}
    curves = {title: lines for title, lines in curves.items() if lines}
    if not curves:
        raise ValueError("the log has nothing to draw.")
    columns = min(3, len(curves))
    figure, axes = plt.subplots(
        -(-len(curves) // columns), columns, figsize=(5 * columns, 3.2 * -(-len(curves) // columns)), squeeze=False
    )
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
    figure.tight_layout()
    temporary = Path(path).with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    os.replace(temporary, path)
