"""Write results as tables and pages."""

from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

TEMPLATES = Path(__file__).parent / "templates"


def format_value(value: float | int | str | None) -> str:
    """Write a cell: floats with three decimals, thousands with commas, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value


def markdown_table(header: Iterable[str], rows: Iterable[Iterable], left: int = 1) -> str:
    """Write a Markdown table; the first `left` columns align left, the others right."""
    lines = [[format_value(cell).replace("|", "\\|") for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * left + ["---:"] * (len(lines[0]) - left))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text_table(header: Iterable[str], rows: Iterable[Iterable], left: int = 1) -> str:
    """Write a table for the terminal; the first `left` columns align left, the others right."""
    lines = [[format_value(cell) for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def page_template(name: str) -> Template:
    """Open an HTML template of `microvlm/templates`; text is escaped, a missing value is an error."""
    loader = FileSystemLoader(TEMPLATES)
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template(name)
