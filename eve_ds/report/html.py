"""Build HTML safely: everything that is not ``Html`` is escaped, so no text of a run can become markup."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TypeAlias

from eve_ds.report.style import CSS


class Html(str):
    """A string of markup."""

    __slots__ = ()


Child: TypeAlias = "str | int | float | Iterable[Child] | None"
VOID = {"img", "meta", "br", "input"}


def render(child: Child) -> Html:
    """Convert a child to markup: ``Html`` unchanged, None empty, iterables joined, all else escaped."""
    if child is None:
        return Html("")
    if isinstance(child, Html):
        return child
    if isinstance(child, str | int | float):
        return Html(html.escape(str(child)))
    return Html("".join(render(item) for item in child))


def tag(name: str, /, *children: Child, **attributes: str | int | float | None) -> Html:
    """An element. ``class_`` becomes ``class``, ``data_x`` becomes ``data-x``; attributes that are None are omitted."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{shown}>" if name in VOID else f"<{name}{shown}>{render(children)}</{name}>")


def section(anchor: str, title: str, *children: Child) -> Html:
    """A section of the page, linked from the list of contents."""
    return tag("section", tag("h2", title), children, id=anchor)


def missing(what: str) -> Html:
    """A note that something is missing."""
    return tag("p", "Missing: ", what, class_="missing")


def key(color: int) -> Html:
    """A square in one of the page's colors, from 0, for a legend."""
    return tag("span", class_="key", style=f"background: var(--c{color + 1})")


def page(title: str, *body: Child, refresh: int | None = None) -> Html:
    """A self-contained document. A browser reads it again every ``refresh`` seconds, if that is given."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="refresh", content=refresh) if refresh else None,
        tag("title", title),
        tag("style", Html(CSS)),
    )
    return Html(f"<!doctype html>\n{tag('html', head, tag('body', tag('main', body)), lang='en')}\n")
