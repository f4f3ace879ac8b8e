"""Print tables."""


def markdown_table(header: list[str], lines: list[list]) -> str:
    show = lambda v: "" if v is None else f"{v:.3f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v  # noqa: E731
    rows = [header, ["---"] * len(header), *[[show(v) for v in line] for line in lines]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
