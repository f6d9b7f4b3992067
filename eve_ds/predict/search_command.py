"""``search``: the images of an index that fit a text or an image best."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from eve_ds.predict.eve import EVE
from eve_ds.predict.image_index import MANIFEST, ImageIndex, check_model
from eve_ds.predict.request_rows import Request, Row, computed
from eve_ds.predict.search_page import Found, search_page
from preprocessing.errors import UserError, printable
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
    if html is not None and Path(html).is_dir():
        raise UserError(f"--html {html}: is a folder; name a file")
    began = time.perf_counter()
    opened = ImageIndex(index)
    opening = time.perf_counter() - began
    eve = load()
    check_model(opened.path, opened.manifest, eve)
    if not os.path.isdir(opened.folder):  # of Path, that raises where a folder above cannot be read
        log.warning(
            '%s: the indexed folder is gone; if it was moved, write its new place in "folder" of %s',
            opened.folder,
            opened.path / MANIFEST,
        )
    seconds: list[float] = []

    def find(rows: Sequence[Row]) -> list[Found]:
        vectors = np.empty((len(rows), eve.feature_dim), np.float32)
        for kind, encode in (("text", eve.text_features), ("image", eve.image_features)):
            if places := [place for place, row in enumerate(rows) if kind in row]:
                vectors[places] = encode([rows[place][kind] for place in places])
        started = time.perf_counter()
        found = opened.search(vectors, k)
        seconds.append((time.perf_counter() - started) / len(rows))
        return list(map(Found, rows, found))

    shown: list[Found] = []
    queries = 0
    for batch in computed(requests, eve.batch_size, find):
        for one in batch:
            for line in _lines(one, opened.folder, as_json):
                print(line)
        sys.stdout.flush()
        queries += len(batch)
        shown += batch[: MOST_ON_PAGE - len(shown)]
    if html is not None:
        write_text(Path(html), replace_surrogates(search_page(shown, opened.folder)))
        if queries > len(shown):
            log.info("%s: has the first %d of %d queries", html, len(shown), queries)
    log.info(
        "%d images: opened in %.1f ms, searched in %.1f ms a query",
        len(opened),
        1e3 * opening,
        1e3 * sum(seconds) / max(1, len(seconds)),
    )


def _lines(found: Found, folder: Path, as_json: bool) -> Iterator[str]:
    for rank, hit in enumerate(found.hits, 1):
        path = str(folder / hit.path)
        if as_json:
            yield json.dumps(found.query | {"rank": rank, "path": path, "score": round(hit.score, 6)})
        else:
            yield f"{rank:3d}  {hit.score:+.4f}  {printable(path)}"
