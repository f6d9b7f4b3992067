"""A stand-in of Weights & Biases' server: as much of its GraphQL and of its file stream as wandb 0.31 asks for.

It answers what ``wandb sync``, an online run and a saved workspace send (wandb's Go core talks, see
https://github.com/wandb/wandb, core/internal/gql and core/internal/filestream), and keeps what arrives. What it does
not know is an error for the client, and is noted in ``problems``.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ENTITY = "stand-in"  # of the account
KEY = "0123456789" * 4  # any is taken
HISTORY, EVENTS, OUTPUT = "wandb-history.jsonl", "wandb-events.jsonl", "output.log"
Variables = dict[str, Any]


@dataclass
class StoredRun:
    """What a server keeps of a run.

    Attributes:
        attributes: of ``upsertBucket``, the newest that were not null.
        config: {key: value}, wandb's own under ``_wandb``.
        lines: of the file stream, by file.
        files: uploaded, by name.
        alerts: (title, text).
        exit_codes: one for each time that the run was told to be complete.
    """

    entity: str
    project: str
    name: str
    attributes: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    alerts: list[tuple[str, str]] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows that were logged, in order."""
        return [json.loads(line) for line in self.lines.get(HISTORY, [])]

    def as_node(self) -> dict[str, Any]:
        """The run as GraphQL has it, with every field that is asked for anywhere."""
        lines = {file: self.lines.get(file, []) for file in (HISTORY, EVENTS, OUTPUT)}
        own = self.config.get("_wandb", {})
        return {
            "id": f"id of {self.name}",
            "name": self.name,
            "displayName": self.attributes.get("displayName"),
            "description": None,
            "sweepName": None,
            "notes": self.attributes.get("notes"),
            "tags": self.attributes.get("tags") or [],
            "state": "finished" if self.exit_codes else "running",
            "config": json.dumps({key: {"value": value} for key, value in self.config.items()}),
            "wandbConfig": json.dumps({"t": own["t"]} if "t" in own else {}),
            "summaryMetrics": (self.lines.get("wandb-summary.json") or ["{}"])[-1],
            "historyLineCount": len(lines[HISTORY]),
            "eventsLineCount": len(lines[EVENTS]),
            "logLineCount": len(lines[OUTPUT]),
            "historyTail": json.dumps(lines[HISTORY][-1:]),
            "eventsTail": json.dumps(lines[EVENTS][-1:]),
            "project": {"id": "project", "name": self.project, "entity": {"id": "entity", "name": self.entity}},
        }


class WandbServer(ThreadingHTTPServer):
    """The server. ``environment``: what a process needs to reach it, and it alone.

    Attributes:
        runs: by id.
        views: the saved workspaces, by name.
        asked: names of all GraphQL operations, in order.
        problems: requests that it could not answer as wandb's server would.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.environment = {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_CONFIG_DIR": str(folder / "config"),
            "WANDB_CACHE_DIR": str(folder / "cache"),
            "WANDB_DATA_DIR": str(folder / "data"),
            "NETRC": str(folder / "netrc"),
            "NO_PROXY": "*",
            "no_proxy": "*",
        }
        self.lock = threading.Lock()
        self.runs: dict[str, StoredRun] = {}
        self.views: dict[str, Variables] = {}
        self.asked: list[str] = []
        self.problems: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that left
            super().handle_error(request, client_address)

    def graphql(self, query: str, given: Variables) -> dict[str, Any]:
        """The data that answers a query. Raises LookupError where this is none that it knows."""
        found = re.search(r"\b(?:query|mutation)\s+(\w+)", query)
        name = found[1] if found else "unnamed"
        self.asked.append(name)
        known = getattr(self, f"_on_{name}", None)
        if known is None:
            raise LookupError(f"unknown operation: {query}")
        answer: dict[str, Any] = known(given)
        return answer

    def _on_ServerFeaturesQuery(self, given: Variables) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _on_Viewer(self, given: Variables) -> dict[str, Any]:
        names = {"entity": ENTITY, "username": ENTITY, "email": "a@example.org", "name": ENTITY, "admin": False}
        return {"viewer": {"id": "viewer", "flags": "{}", "teams": {"edges": [{"node": {"name": ENTITY}}]}, **names}}

    def _on_GetDefaultEntity(self, given: Variables) -> dict[str, Any]:
        return self._on_Viewer(given)

    def _on_OrganizationCoreWeaveOrganizationID(self, given: Variables) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def _on_RunResumeStatus(self, given: Variables) -> dict[str, Any]:
        run = self.runs.get(given["name"])
        entity = {"name": given.get("entity") or ENTITY, "id": "entity"}
        return {"model": {"id": "p", "name": given["project"], "entity": entity, "bucket": run and run.as_node()}}

    def _on_UpsertBucket(self, given: Variables) -> dict[str, Any]:
        name = given["name"]
        inserted = name not in self.runs
        if inserted:
            self.runs[name] = StoredRun(given.get("entity") or ENTITY, given["project"], name)
        run = self.runs[name]
        if given.get("config"):
            run.config = {key: item["value"] for key, item in json.loads(given["config"]).items()}
        run.attributes |= {key: value for key, value in given.items() if value is not None and key != "config"}
        return {"upsertBucket": {"bucket": run.as_node(), "inserted": inserted}}

    def _on_CreateRunFiles(self, given: Variables) -> dict[str, Any]:
        files = [{"name": f, "uploadUrl": f"{self.url}/storage/{given['run']}/{f}"} for f in given["files"]]
        return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}

    def _on_NotifyScriptableRunAlert(self, given: Variables) -> dict[str, Any]:
        self.runs[given["runName"]].alerts.append((given["title"], given["text"]))
        return {"notifyScriptableRunAlert": {"success": True}}

    def _on_UpsertView2(self, given: Variables) -> dict[str, Any]:
        inserted = given["name"] not in self.views
        self.views[given["name"]] = given
        return {"upsertView": {"view": {"id": f"id of {given['name']}", "name": given["name"]}, "inserted": inserted}}

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        """Take lines of the file stream. Raises LookupError for an unknown run or a gap before the lines."""
        run = self.runs.get(name)
        if run is None:
            raise LookupError(f"file stream of the unknown run {name}")
        for file, part in sent.get("files", {}).items():
            lines, first = run.lines.setdefault(file, []), part["offset"]
            if first > len(lines):
                raise LookupError(f"{file} of {name}: lines from {first} on after {len(lines)}")
            lines[first : first + len(part["content"])] = part["content"]
        if sent.get("complete"):
            run.exit_codes.append(sent["exitcode"])


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self._body()
        path = self.path.strip("/").split("/")
        with self.server.lock:
            try:
                asked = json.loads(body)
                if path == ["graphql"]:
                    self._answer(200, {"data": self.server.graphql(asked["query"], asked.get("variables") or {})})
                elif len(path) == 5 and (path[0], path[-1]) == ("files", "file_stream"):
                    self.server.stream(path[3], asked)
                    self._answer(200, {"exitcode": None, "limits": {}})
                else:
                    raise LookupError(f"POST {self.path}")
            except (LookupError, ValueError) as error:
                self.server.problems.append(f"{type(error).__name__}: {error}")
                self._answer(400, {"errors": [{"message": str(error)}]})

    def do_PUT(self) -> None:
        body = self._body()
        with self.server.lock:
            _, _, run, name = self.path.split("/", 3)
            self.server.runs[run].files[name] = body
        self._answer(200, {})

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def wandb_server(folder: Path) -> Iterator[WandbServer]:
    """Run a server for the length of the block. wandb's own files go below ``folder``."""
    server = WandbServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def clients(server: WandbServer) -> dict[int, str]:
    """{process id: command line} of the processes on this host that were told to talk to the server."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"WANDB_BASE_URL={server.url}".encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:  # ended meanwhile, or another user's
            continue
    return found
