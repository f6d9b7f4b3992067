"""The web page of ``serve``: answers, matches, judgements, search and attention, for whoever reaches the address.

What a request may do is bounded: its size, texts, pixels; it names images of the index by their row, never by a path.
"""

from __future__ import annotations

import base64
import functools
import io
import ipaddress
import logging
import re
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from flask import Flask, Response, abort, jsonify, render_template, request, send_from_directory
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from eve_ds.predict.eve import EVE
from eve_ds.predict.image_index import ImageIndex
from eve_ds.predict.raw_inputs import read_image
from eve_ds.predict.search_page import THUMBNAIL
from eve_ds.report.style import CSS
from preprocessing.errors import UserError

PAGE = Path(__file__).parent / "page"
MEGABYTE = 2**20
FORM_BYTES = 2**19  # of a request beside its images
TEXT_LENGTH = 500  # characters; a model reads 40 tokens
MOST_TEXTS = 50
MOST_HITS = 100
MOST_FIELDS = 100  # of a form
TOP = 5  # answers to a question
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
log = logging.getLogger(__name__)


@dataclass
class Served:
    """What the page offers.

    Args:
        models: by task: vqa, retrieval, nlvr.
        index: made with the retrieval model, or None.
        host: that the server listens at.
        loopback: whether only this machine reaches it.
        max_upload: MB, of a request's images.
    """

    models: Mapping[str, EVE]
    index: ImageIndex | None
    host: str
    loopback: bool
    max_upload: int

    def knows(self, host: str) -> bool:
        """Whether a request's Host header is one of the server's names or a number.

        The page of another site can lead its own name to this machine and then read what it sends (DNS rebinding); a
        number it cannot take. Ports differ where a tunnel leads here.
        """
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in ("localhost", self.host.lower()):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return not self.loopback and name == socket.gethostname().lower()
        return address.is_loopback or not self.loopback


def create_app(served: Served) -> Flask:
    """The application. One request at a time computes; the others wait."""
    app = Flask(__name__, static_folder=None, template_folder=str(PAGE))
    app.config["MAX_CONTENT_LENGTH"] = served.max_upload * MEGABYTE + FORM_BYTES
    app.config["MAX_FORM_MEMORY_SIZE"] = FORM_BYTES
    app.config["MAX_FORM_PARTS"] = MOST_FIELDS
    app.before_request(functools.partial(_refuse_others, served))
    app.after_request(_add_headers)
    app.register_error_handler(Exception, functools.partial(_as_json, served.max_upload))
    _add_files(app, served)
    computing = threading.Lock()

    def add(path: str, compute: Callable[[Served], dict[str, Any]], *needs: str) -> None:
        def view() -> Response:
            if any(task not in served.models for task in needs):
                abort(404)
            with computing:
                return jsonify(compute(served))

        app.add_url_rule(path, path, view, methods=["POST"])

    add("/api/answer", _answer, "vqa")
    add("/api/match", _match, "retrieval")
    add("/api/judge", _judge, "nlvr")
    add("/api/attention", _attention)
    if served.index is not None:
        add("/api/search", _search, "retrieval")

        @app.get("/thumbnail/<int:row>")
        def thumbnail(row: int) -> Response:
            with computing:
                return Response(_thumbnail(served, row), mimetype="image/jpeg")

    return app


def _add_files(app: Flask, served: Served) -> None:
    @app.get("/")
    def page() -> str:
        bounds = {"text_length": TEXT_LENGTH, "most_texts": MOST_TEXTS, "most_hits": MOST_HITS}
        names = " · ".join(sorted({_name(eve) for eve in served.models.values()}))
        return render_template("index.html", served=served, tasks=list(served.models), names=names, **bounds)

    @app.get("/<name>.js")
    def script(name: str) -> Response:
        return send_from_directory(PAGE, f"{name}.js", mimetype="text/javascript")

    @app.get("/style.css")
    def style() -> Response:
        return Response(f"{CSS}\n{(PAGE / 'page.css').read_text(encoding='utf-8')}", mimetype="text/css")

    @app.get("/favicon.ico")
    def icon() -> Response:
        return Response(status=204)


def _name(eve: EVE) -> str:
    """Of a model's run; folders above it are no visitor's business."""
    folder = eve.files.folder.resolve()
    return (folder.parent if folder.name == "model" else folder).name


def _refuse_others(served: Served) -> None:
    """Requests that another site's page makes a browser send."""
    if not served.knows(request.host):
        abort(403, "the address in the browser is none of this server's")
    origin = request.headers.get("Origin")
    if origin is not None and origin.lower() not in (f"http://{request.host}", f"https://{request.host}"):
        abort(403, "the request comes from another site")


def _add_headers(response: Response) -> Response:
    response.headers.update(HEADERS)
    return response


def _as_json(max_upload: int, error: Exception) -> tuple[Response, int]:
    """{"error": one line} for any error; what was not foreseen is logged, and not told."""
    if isinstance(error, UserError):
        return jsonify(error=" ".join(str(error).split())), 400
    if isinstance(error, RequestEntityTooLarge):
        most = f"images of {max_upload} MB in all and at most {MOST_FIELDS} fields"
        return jsonify(error=f"the request is too large: {most} are taken"), 413
    if isinstance(error, HTTPException):
        return jsonify(error=" ".join(str(error.description).split())), error.code or 500
    log.error("%s %s failed", request.method, request.path, exc_info=error)
    return jsonify(error="an unexpected error; the server's log has it"), 500


def _image(name: str) -> bytes:
    if name not in request.files:
        raise UserError(f"the request has no {name}; choose an image")
    return request.files[name].read()


def _text(name: str) -> str:
    return _bounded(name, request.form.get(name, ""))


def _bounded(name: str, text: str) -> str:
    if not text.strip():
        raise UserError(f"the {name} is empty; write one")
    if len(text) > TEXT_LENGTH:
        raise UserError(f"the {name} has {len(text)} characters; {TEXT_LENGTH} are taken")
    return text


def _answer(served: Served) -> dict[str, Any]:
    found = served.models["vqa"].answer(_image("image"), _text("question"), TOP)
    return {"answers": [one._asdict() for one in found]}


def _match(served: Served) -> dict[str, Any]:
    texts = request.form.getlist("text")
    if not 1 <= len(texts) <= MOST_TEXTS:
        raise UserError(f"the request has {len(texts)} texts; 1 to {MOST_TEXTS} are taken")
    texts = [_bounded("text", text) for text in texts]
    found = served.models["retrieval"].match(_image("image"), texts)
    return {"matches": [{"text": text} | one._asdict() for text, one in zip(texts, found, strict=True)]}


def _judge(served: Served) -> dict[str, Any]:
    found = served.models["nlvr"].judge(_image("image_0"), _image("image_1"), _text("statement"))
    return dict(found._asdict())


def _attention(served: Served) -> dict[str, Any]:
    """Maps of the answer, if there are such, and of each word, [blocks, maps, rows, columns] float32, little-endian.

    ``tokens``: that the model reads, if the text has more, else None.
    """
    task = request.form.get("task", "")
    if task not in served.models:
        abort(404)
    eve, text = served.models[task], _text("text")
    longest = eve.config.max_text_length
    maps = eve.attention(_image("image"), text, task)
    values = maps.of_word if maps.of_answer is None else np.concatenate([maps.of_answer[:, None], maps.of_word], axis=1)
    return {
        "words": maps.words,
        "answer": maps.of_answer is not None,
        "tokens": longest if len(eve.tokenizer.encode(text, longest + 1)) > longest else None,
        "shape": values.shape,
        "maps": base64.b64encode(values.astype("<f4").tobytes()).decode(),
    }


def _search(served: Served) -> dict[str, Any]:
    assert served.index is not None
    eve = served.models["retrieval"]
    typed = request.form.get("k", "10")
    k = int(typed) if re.fullmatch(r"[0-9]{1,9}", typed) else 0
    if not 1 <= k <= MOST_HITS:
        raise UserError(f"k={typed[:20]}: must be a number between 1 and {MOST_HITS}")
    vector = eve.image_features(_image("image")) if "image" in request.files else eve.text_features(_text("text"))
    (rows,) = served.index.search_rows(vector[None], k)
    return {"hits": [{"row": row, "path": served.index.path_of(row), "score": score} for row, score in rows]}


def _thumbnail(served: Served, row: int) -> bytes:
    assert served.index is not None
    if row >= len(served.index):
        abort(404)
    try:
        image = read_image(
            served.index.folder / served.index.path_of(row), served.models["retrieval"].transform.max_pixels
        )
    except UserError:
        abort(404, "the image cannot be read any more")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
