"""``search --html``: queries and the images found, as one page that needs neither network nor other files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eve_ds.predict.image_index import Hit
from eve_ds.predict.raw_inputs import read_image
from eve_ds.report.html import Html, page, tag
from eve_ds.report.images import thumbnail
from preprocessing.errors import UserError, printable
from preprocessing.shards.schema import PILLOW_PIXELS

THUMBNAIL = 240  # pixels
_GRID = "display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 1rem"
_FIGURE = "margin: 0; overflow-wrap: anywhere"
_IMAGE = "width: 100%; height: 180px; object-fit: contain"


class Found(NamedTuple):
    """A query, {"text": ...} or {"image": path}, and its hits, best first."""

    query: dict[str, Any]
    hits: list[Hit]


def search_page(found: Sequence[Found], folder: Path) -> Html:
    """The page. ``folder``: that the hits' paths are relative to."""
    sections = []
    for query, hits in found:
        title = tag("h2", query["text"]) if "text" in query else tag("h2", "Images like ", printable(query["image"]))
        own = tag("p", _image(Path(query["image"]))) if "image" in query else None
        figures = [_figure(folder / hit.path, hit, rank) for rank, hit in enumerate(hits, 1)]
        sections.append(tag("section", title, own, tag("div", figures, style=_GRID)))
    return page("Search results", tag("h1", "Search results"), sections)


def _figure(path: Path, hit: Hit, rank: int) -> Html:
    caption = tag("figcaption", f"{rank}. {hit.score:.4f} ", tag("span", printable(hit.path), class_="note"))
    return tag("figure", _image(path), caption, style=_FIGURE)


def _image(path: Path) -> Html:
    """``<img>`` with the image embedded, or a note that it cannot be read (any more)."""
    try:
        source = thumbnail(read_image(path, PILLOW_PIXELS), THUMBNAIL)
    except UserError as error:
        return tag("span", "no image", class_="missing", title=str(error))
    return tag("img", src=source, alt=printable(path.name), style=_IMAGE, loading="lazy")
