"""Print and plot the results."""

from pathlib import Path
from statistics import median

from microvlm.tables import markdown_table

from .shapes import SHAPES
from .subjects import CAPTION, LLAMA_CPP
from .workers import Result


def megabytes(value: int | None) -> str:
    return "not measured" if value is None else f"{value / 1e6:,.1f}"


def speed_table(results: dict[str, Result]) -> str:
    """Write medians; tokens per second with their range."""
    header = ["", "prompt", "first token, ms", "tokens/s", f"{CAPTION} tokens from the image, ms", "load, s"]
    rows = []
    for name, r in results.items():
        rates = [turn["rate"] for turn in r.turns]
        o = r.opened
        row = [name, f"{'image' if o['sees'] else 'no image'}, {o['positions']:,} positions"]
        row += [f"{r.median('first') * 1e3:.1f}", f"{r.median('rate'):.1f} ({min(rates):.1f} to {max(rates):.1f})"]
        row += [f"{r.median('caption') * 1e3:,.0f}", f"{o['load']:.2f}", megabytes(o["disk"]), megabytes(r.peak)]
        rows.append(row)
    return markdown_table([*header, "on disk, MB", "peak, MB"], rows, left=2)


def limit_table(results: dict[str, Result], bandwidth: float) -> str:
    """Write the tokens per second of only reading the weights, and the share reached."""
    rows = []
    for name, r in results.items():
        formats = sorted(r.opened["read"].items(), key=lambda item: -item[1])
        text = ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in formats if size / r.read > 1e-3)
        limit = bandwidth / r.read
        rows.append([name, text, megabytes(r.read), f"{limit:.1f}", f"{r.median('rate') / limit:.1%}"])
    return markdown_table(["", "formats, MB", "read a token, MB", "limit, tokens/s", "reached"], rows, left=2)


def ratios(base: Result, other: Result) -> dict[str, float]:
    """Compute how many times faster `base` is: medians over the rounds' ratios."""
    pairs = list(zip(base.turns, other.turns))
    return {
        "rate": median(b["rate"] / o["rate"] for b, o in pairs),
        **{key: median(o[key] / b[key] for b, o in pairs) for key in ("first", "caption")},
    }


def ratio_table(name: str, results: dict[str, Result]) -> str:
    """Compare one subject with all others."""
    rows = []
    for other, result in results.items():
        if other != name:
            r = ratios(results[name], result)
            rows.append([other, *(f"x {r[key]:.2f}" for key in ("rate", "first", "caption"))])
    return markdown_table([f"{name} is faster than", "tokens/s", "first token", f"{CAPTION} tokens"], rows)


def pick_colour(name: str) -> str:
    return "tab:orange" if name in LLAMA_CPP else "tab:gray" if name.startswith(tuple(SHAPES)) else "tab:blue"


def plot(results: dict[str, Result], bandwidth: float, folder: Path) -> None:
    """Plot tokens per second with range and limit (`speed_tokens.png`), and over bytes on disk (`speed_disk.png`)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    names = list(results)
    colours = [pick_colour(name) for name in names]
    rates = [results[name].median("rate") for name in names]
    # bars with the range of the rounds, and a mark at the limit
    lowest = [rate - min(t["rate"] for t in results[name].turns) for name, rate in zip(names, rates)]
    highest = [max(t["rate"] for t in results[name].turns) - rate for name, rate in zip(names, rates)]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.34 * len(names)), layout="constrained")
    axes.barh(names, rates, xerr=[lowest, highest], color=colours, error_kw={"elinewidth": 1})
    limits = [bandwidth / results[name].read for name in names]
    axes.plot(limits, names, "k|", markersize=12, label="limit: bandwidth / bytes read a token")
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="tokens per second, median and range")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(folder / "speed_tokens.png", dpi=120)
    plt.close(figure)

    # a point per subject
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    sizes = [results[name].opened["disk"] / 1e6 for name in names]
    axes.scatter(sizes, rates, c=colours)
    for name, size, rate in zip(names, sizes, rates):
        axes.annotate(name, (size, rate), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="weights on disk, MB", ylabel="tokens per second, median")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(folder / "speed_disk.png", dpi=120)
    plt.close(figure)
