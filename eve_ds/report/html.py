"""HTML by construction: what is not ``Html`` already is escaped, so no text of a run can become markup."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TypeAlias

from eve_ds.report.style import CSS


class Html(str):
    """Text that is markup."""

    __slots__ = ()


Child: TypeAlias = "str | int | float | Iterable[Child] | None"
VOID = {"img", "meta", "br"}


def render(child: Child) -> Html:
    """A child as markup: ``Html`` as it is, None as nothing, lists joined, anything else escaped."""
    if child is None:
        return Html("")
    if isinstance(child, Html):
        return child
    if isinstance(child, str | int | float):
        return Html(html.escape(str(child)))
    return Html("".join(render(item) for item in child))


def tag(name: str, /, *children: Child, **attributes: str | int | float | None) -> Html:
    """One element. Attribute ``class_`` is ``class``, ``data_x`` is ``data-x``; those that are None are left out."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{shown}>" if name in VOID else f"<{name}{shown}>{render(children)}</{name}>")


def section(anchor: str, title: str, *children: Child) -> Html:
    """A titled part of the page that the list of contents links to."""
    return tag("section", tag("h2", title), children, id=anchor)


def missing(what: str) -> Html:
    """Says that something is not there, in place of leaving it out silently."""
    return tag("p", "Missing: ", what, class_="missing")


def page(title: str, *body: Child) -> Html:
    """A whole document that needs nothing from outside."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(CSS)),
    )
    return Html(f"<!doctype html>\n{tag('html', head, tag('body', tag('main', body)), lang='en')}\n")
