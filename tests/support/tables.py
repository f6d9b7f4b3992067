"""The tables of a page."""

from __future__ import annotations

import re

from tests.support.page import Page


def table(content: str, anchor: str, first: int = 0) -> dict[str, list[str]]:
    """{a cell of a row, the first by default: those after it} of the table in a section."""
    part = content[content.index(f'<section id="{anchor}">') :].split("</section>")[0]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", part)
    cells = [[Page(cell).text for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]
    return {row[first]: [text.replace("\xa0", " ") for text in row[first + 1 :]] for row in cells}
