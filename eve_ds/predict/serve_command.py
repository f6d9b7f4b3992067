"""``serve``: a web page at which people use models, for this machine alone unless another address is asked for."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from typing import NoReturn

import waitress

from eve_ds.predict.eve import EVE
from eve_ds.predict.image_index import ImageIndex, check_model
from eve_ds.predict.web_app import MEGABYTE, Served, create_app
from preprocessing.errors import UserError

THREADS = 8  # one computes, the others take what comes and wait
CONNECTIONS = 512  # also those that send nothing; below the usual 1,024 files of a process
MOST_UPLOAD = 1024  # MB
log = logging.getLogger(__name__)


def serve(
    load: Callable[[str], EVE], checkpoints: Sequence[str], index: str | None, host: str, port: int, max_upload: int
) -> None:
    """Serve until SIGTERM or Ctrl-C, after a line on stdout with the address.

    Args:
        load: gives the model of a checkpoint.
        checkpoints: at most one with the head of each task.
        index: folder of an index that the retrieval checkpoint has made, or None.
        host, port: to listen at; port 0 is any free one.
        max_upload: MB, of a request's images.
    Raises:
        UserError: an address that cannot be had, two checkpoints of one task, or a file that is missing.
    """
    if not 1 <= max_upload <= MOST_UPLOAD:
        raise UserError(f"--max_upload {max_upload}: must be between 1 and {MOST_UPLOAD} MB")
    listener = listening(host, port)  # before the models, which take a while
    address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    models = models_by_task(load, checkpoints)
    served = Served(models, opened_index(index, models), host, address.is_loopback, max_upload)
    if not served.loopback:
        log.warning("--host %s: whoever reaches this machine can use the page; there is no login", host)
    app = create_app(served)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # that requests wait is no news
    server = waitress.create_server(
        app,
        sockets=[listener],
        threads=THREADS,
        connection_limit=CONNECTIONS,
        ident=None,
        # Above the application's own bound, whose refusal says what is taken; this one just closes the connection.
        max_request_body_size=2 * app.config["MAX_CONTENT_LENGTH"] + MEGABYTE,
    )
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        shown = socket.gethostname() if address.is_unspecified else f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{listener.getsockname()[1]}/  (Ctrl-C ends it)", flush=True)
        server.run()
    except KeyboardInterrupt:
        pass
    finally:
        server.close()


def _stop(number: int, frame: object) -> NoReturn:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_DFL)  # a second one need not wait for what is being computed
    raise KeyboardInterrupt


def listening(host: str, port: int) -> socket.socket:
    """A socket at that address. Raises UserError naming the option."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: must be between 0 and 65535")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host}: is no address of this machine ({reason})") from None
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: {os.strerror(error.errno or 0)}; choose another, or 0 for any free port"
        ) from None


def models_by_task(load: Callable[[str], EVE], checkpoints: Sequence[str]) -> dict[str, EVE]:
    """Load the checkpoints, with all that answers need, so that what is missing is told now."""
    models: dict[str, EVE] = {}
    for checkpoint in checkpoints:
        eve = load(checkpoint)
        for task in eve.tasks:
            if task in models:
                raise UserError(
                    f"{models[task].files.weights} and {eve.files.weights} have both the head of {task}; give one"
                )
            models[task] = eve
            eve.task(task)
        eve.tokenizer  # noqa: B018
        if "vqa" in eve.tasks:
            eve.answers  # noqa: B018
    return models


def opened_index(index: str | None, models: dict[str, EVE]) -> ImageIndex | None:
    """The index, if one is given, of the retrieval model. Raises UserError if that is missing or another one."""
    if index is None:
        return None
    opened = ImageIndex(index)
    if "retrieval" not in models:
        raise UserError(f"--index {index}: give the retrieval checkpoint that it was made with, too")
    check_model(opened.path, opened.manifest, models["retrieval"])
    return opened
