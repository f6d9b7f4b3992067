"""``search``: the images of an index that fit a text or an image best."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from eve_ds.predict.eve import EVE
from eve_ds.predict.image_index import ImageIndex, check_model
from eve_ds.predict.request_rows import Request, Row, computed
from eve_ds.predict.search_page import search_page
from preprocessing.errors import printable
from preprocessing.local_files import replace_surrogates, write_text

MOST_ON_PAGE = 100  # queries
log = logging.getLogger(__name__)


def search_images(
    load: Callable[[], EVE], index: str, requests: Iterable[Request], k: int, as_json: bool, html: str | None
) -> None:
    """Print the best images for each query, and write them as a page.

    Args:
        load: the model; called when the index has been opened.
        index: its folder.
        requests: rows with "text" or "image".
        k: images to a query.
        as_json: print a JSON object a line: the row with rank, path and score, a line for each image.
        html: the page's file, or None; it has the first queries.
    Raises:
        UserError: no index, another model, or a bad query.
    """
    began = time.perf_counter()
    opened = ImageIndex(index)
    opening = time.perf_counter() - began
    eve = load()
    check_model(opened.path, opened.manifest, eve)
    seconds: list[float] = []

    def find(rows: Sequence[Row]) -> list[Row]:
        vectors = np.empty((len(rows), eve.feature_dim), np.float32)
        for kind, encode in (("text", eve.text_features), ("image", eve.image_features)):
            if places := [place for place, row in enumerate(rows) if kind in row]:
                vectors[places] = encode([rows[place][kind] for place in places])
        started = time.perf_counter()
        found = opened.search(vectors, k)
        seconds.append((time.perf_counter() - started) / len(rows))
        return [row | {"hits": hits} for row, hits in zip(rows, found, strict=True)]

    shown: list[Row] = []
    for row in itertools.chain.from_iterable(computed(requests, eve.batch_size, find)):
        if html and len(shown) < MOST_ON_PAGE:
            shown.append(row)
        query = {name: value for name, value in row.items() if name != "hits"}
        for rank, hit in enumerate(row["hits"], 1):
            path = str(opened.folder / hit.path)
            if as_json:
                print(json.dumps(query | {"rank": rank, "path": path, "score": round(hit.score, 6)}))
            else:
                print(f"{rank:3d}  {hit.score:+.4f}  {printable(path)}")
    if html:
        write_text(Path(html), replace_surrogates(search_page(shown, [row["hits"] for row in shown], opened.folder)))
    log.info(
        "%d images: opened in %.1f ms, searched in %.1f ms a query",
        len(opened),
        1e3 * opening,
        1e3 * sum(seconds) / max(1, len(seconds)),
    )
