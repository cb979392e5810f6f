# SPDX-License-Identifier: Apache-2.0
"""A page as HTML or Markdown. All text is escaped: it may come from files that somebody else wrote."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import files


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Code:
    """Lines of a command or a file."""

    text: str


@dataclass(frozen=True)
class Table:
    """rows: texts of cells, as many as headings; what follows a line break in one is smaller. headings: all empty for a
    table of names and values. numbers: of the columns that are aligned to the right."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()


@dataclass(frozen=True)
class Figure:
    """name: of its file beside a Markdown page. svg: as matplotlib writes it. says: for who cannot see it."""

    name: str
    svg: str
    says: str


@dataclass
class Section:
    title: str
    parts: list[Text | Code | Table | Figure] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    title: str
    sections: Sequence[Section]


def write(page: Page, path: str) -> None:
    """Writes Markdown, with its figures beside it, where the name ends in `.md`, else one HTML file.

    Raises OSError if a file cannot be written.
    """
    if Path(path).suffix != ".md":
        files.write_text(path, as_html(page))
        return
    names = {}
    for figure in (part for section in page.sections for part in section.parts if isinstance(part, Figure)):
        names[figure.name] = f"{Path(path).stem}_{figure.name}.svg"
        files.write_text(Path(path).with_name(names[figure.name]), figure.svg)
    files.write_text(path, as_markdown(page, names))


STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1d2329; background: #fff;
  max-width: 68rem; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1.2rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .5rem; border-top: 2px solid #1d2329; }
p { margin: .6rem 0; max-width: 48rem; }
table { border-collapse: collapse; margin: .9rem 0; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .42rem; text-align: left; vertical-align: top; border-bottom: 1px solid #dde1e6; }
th:first-child, td:first-child { padding-left: 0; }
th { font-weight: 600; border-bottom: 1.5px solid #6b7681; vertical-align: bottom; }
th.n, td.n { text-align: right; }
td.n { white-space: nowrap; }
small { color: #5b6670; font-size: .8em; }
pre { background: #f4f6f8; padding: .7rem .9rem; font: .8rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 3px; }
figure { margin: 1rem 0; }
svg { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
@media print {
  html { font-size: 12px; }
  body { max-width: none; margin: 0; padding: 0; font-size: 11px; }
  h2, figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .wide { overflow: visible; }
  pre { border: 1px solid #dde1e6; }
}
"""


def as_html(page: Page) -> str:
    """One file without scripts; the browser is told to run none and to fetch nothing."""
    body = [f"<h1>{html.escape(page.title)}</h1>"]
    for section in page.sections:
        body.append(f"<section>\n<h2>{html.escape(section.title)}</h2>")
        body += [_html(part) for part in section.parts]
        body.append("</section>")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(page.title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>\n",
        ]
    )


def _html(part: Text | Code | Table | Figure) -> str:
    if isinstance(part, Text):
        return f"<p>{html.escape(part.text)}</p>"
    if isinstance(part, Code):
        return f"<pre>{html.escape(part.text)}</pre>"
    if isinstance(part, Figure):
        label = html.escape(part.says, quote=True)
        return f'<figure role="img" aria-label="{label}">\n{_inline(part)}\n</figure>'
    kinds = [' class="n"' if column in part.numbers else "" for column in range(len(part.headings))]
    head = [f"<thead><tr>{_cells('th', kinds, part.headings)}</tr></thead>"] if any(part.headings) else []
    lines = ['<div class="wide"><table>', *head, "<tbody>"]
    lines += [f"<tr>{_cells('td', kinds, row)}</tr>" for row in part.rows]
    return "\n".join([*lines, "</tbody>", "</table></div>"])


def _cells(tag: str, kinds: Sequence[str], cells: Sequence[str]) -> str:
    return "".join(f"<{tag}{kind}>{_cell(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))


def _cell(text: str) -> str:
    first, _, rest = text.partition("\n")
    return html.escape(first) + (f"<br><small>{html.escape(rest)}</small>" if rest else "")


def _inline(figure: Figure) -> str:
    """The SVG's element alone, its ids told apart from those of the page's other figures."""
    svg = figure.svg[figure.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.S)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{figure.name}-", svg).strip()


def as_markdown(page: Page, figures: Mapping[str, str]) -> str:
    """figures: by name, the files that they are in."""
    lines = [f"# {_marked(page.title)}", ""]
    for section in page.sections:
        lines += [f"## {_marked(section.title)}", ""]
        for part in section.parts:
            lines += [*_markdown(part, figures), ""]
    return "\n".join(lines).rstrip() + "\n"


def _markdown(part: Text | Code | Table | Figure, figures: Mapping[str, str]) -> list[str]:
    if isinstance(part, Text):
        return [_marked(part.text)]
    if isinstance(part, Code):
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", part.text)), default=0))
        return [fence, part.text.rstrip("\n"), fence]
    if isinstance(part, Figure):
        return [f"![{_marked(part.says)}](<{figures[part.name]}>)"]
    rule = ["---:" if column in part.numbers else "---" for column in range(len(part.headings))]
    return [
        f"| {' | '.join(row)} |" for row in (map(_marked, part.headings), rule, *(map(_marked, r) for r in part.rows))
    ]


def _marked(text: str) -> str:
    """Text in one line, in which Markdown and HTML see nothing but text."""
    escaped = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
