"""The web page's requests: what is refused, and that nothing of the server is told; options of ``serve``."""

from __future__ import annotations

import io
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flask.testing import FlaskClient
from PIL import Image

from eve_ds.errors import exit_code
from eve_ds.predict import EVE
from eve_ds.predict.__main__ import main
from eve_ds.predict.image_index import ImageIndex
from eve_ds.predict.web_app import FORM_BYTES, MEGABYTE, MOST_FIELDS, MOST_TEXTS, TEXT_LENGTH, Served, create_app
from tests.support.predicting import exported, image_files

ALL = ("answer", "match", "judge", "attention", "search")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models vqa and itr, and an index of three images, one of which is gone."""
    place = tmp_path_factory.mktemp("web")
    exported(place / "vqa", "vqa")
    exported(place / "itr", "retrieval")
    images = image_files(place / "photos", 3)
    assert predict("index", place / "photos", "--out", place / "index", "--checkpoint", place / "itr") == 0
    Path(images[2]).unlink()
    return place


@pytest.fixture(scope="module")
def served(folder: Path) -> Served:
    models = {"vqa": EVE.from_pretrained(folder / "vqa"), "retrieval": EVE.from_pretrained(folder / "itr")}
    return Served(models, ImageIndex(folder / "index"), "127.0.0.1", loopback=True, max_upload=1)


@pytest.fixture
def client(served: Served) -> FlaskClient:
    return create_app(served).test_client()


def predict(*arguments: object) -> int:
    return exit_code(lambda: main([str(argument) for argument in arguments]))


def image(folder: Path) -> tuple[io.BytesIO, str]:
    return io.BytesIO((folder / "photos" / "image_0000.png").read_bytes()), "image.png"


def told(client: FlaskClient, path: str, data: dict[str, Any], code: int) -> str:
    """The one line of a refusal."""
    response = client.post(path, data=data)
    assert response.status_code == code and response.is_json
    line: str = response.json["error"]
    assert list(response.json) == ["error"] and line and "\n" not in line
    return line


def test_requests_that_another_site_makes_a_browser_send_are_refused(client: FlaskClient) -> None:
    for host in ("localhost:8000", "127.0.0.1:9", "[::1]:8000", "LOCALHOST"):
        assert client.get("/", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example:8000", "10.0.0.1:8000", "[", socket.gethostname() + "x"):
        response = client.get("/", headers={"Host": host})
        assert response.status_code in (400, 403) and b"<html" not in response.data
    own = {"Host": "localhost:8000"}
    for origin in ("http://evil.example", "null", "http://localhost:8001", "http://localhost", "http://["):
        assert client.post("/api/answer", headers=own | {"Origin": origin}).status_code == 403
    assert client.post("/api/answer", headers=own | {"Origin": "http://localhost:8000"}).status_code == 400


def test_an_open_address_knows_its_numbers_and_its_own_name_but_no_other(served: Served) -> None:
    open_one = replace(served, host="0.0.0.0", loopback=False)
    assert all(map(open_one.knows, ("10.0.0.1:8000", f"{socket.gethostname()}:8000", "localhost:8000", "[fe80::1]:80")))
    assert not open_one.knows("evil.example:8000")
    assert replace(served, host="Lab.example", loopback=False).knows("lab.example:8000")


def test_every_reply_forbids_what_is_not_its_own(client: FlaskClient) -> None:
    for path in ("/", "/page.js", "/style.css", "/thumbnail/0", "/nothing"):
        headers = client.get(path).headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "*" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"


def test_thumbnails_are_of_rows_of_the_index_alone(client: FlaskClient) -> None:
    found = client.get("/thumbnail/1")
    assert found.mimetype == "image/jpeg" and Image.open(io.BytesIO(found.data)).size == (40, 40)
    for path in ("3", "-1", "99999999999999999999", "..%2f..%2fvqa", "image_0000.png"):
        assert client.get(f"/thumbnail/{path}").status_code == 404
    gone = client.get("/thumbnail/2")
    assert gone.status_code == 404 and "photos" not in gone.text
    assert client.get("/..%2fweb_app.py").status_code == client.get("/../web_app.js").status_code == 404


def test_bad_requests_are_one_line_that_names_no_file_of_the_server(client: FlaskClient, folder: Path) -> None:
    lines = [
        told(client, "/api/answer", {"question": "what"}, 400),
        told(client, "/api/answer", {"image": image(folder)}, 400),
        told(client, "/api/answer", {"image": image(folder), "question": "a" * (TEXT_LENGTH + 1)}, 400),
        told(client, "/api/answer", {"image": (io.BytesIO(b"\x89PNG junk"), "../../x"), "question": "what"}, 400),
        told(client, "/api/match", {"image": image(folder)}, 400),
        told(client, "/api/match", {"image": image(folder), "text": ["a"] * (MOST_TEXTS + 1)}, 400),
        *(told(client, "/api/search", {"text": "a", "k": k}, 400) for k in ("0", "abc", "1e2", "", "9" * 5000)),
        told(client, "/api/search", {"image": image(folder), **{f"field{n}": "a" for n in range(MOST_FIELDS)}}, 413),
        told(client, "/api/search", {}, 400),
        told(client, "/api/judge", {"statement": "a"}, 404),
        told(client, "/api/attention", {"task": "nlvr", "image": image(folder), "text": "a"}, 404),
        told(client, "/api/nothing", {}, 404),
        told(client, "/api/answer", {"image": image(folder), "question": "a" * (FORM_BYTES + 1)}, 413),
        told(client, "/api/answer", {"image": (io.BytesIO(bytes(MEGABYTE + FORM_BYTES)), "x")}, 413),
    ]
    assert not [line for line in lines if str(folder) in line or "eve_ds" in line]


def test_too_many_pixels_are_refused_before_they_are_decoded(folder: Path, served: Served) -> None:
    few = EVE.from_pretrained(folder / "vqa", max_pixels=100)
    client = create_app(replace(served, models={"vqa": few}, index=None)).test_client()
    line = told(client, "/api/answer", {"image": image(folder), "question": "what"}, 400)
    assert "32 x 32 pixels, max_pixels=100" in line


def test_an_unexpected_error_is_logged_and_not_told(
    served: Served, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = EVE.from_pretrained(folder / "vqa")
    broken.task("vqa").output[-1].weight.data = torch.zeros(1, 1)
    client = create_app(replace(served, models={"vqa": broken})).test_client()
    line = told(client, "/api/answer", {"image": image(folder), "question": "what"}, 500)
    assert line == "an unexpected error; the server's log has it"
    assert "POST /api/answer failed" in caplog.text and "Traceback" in caplog.text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--checkpoint", "gone"], "gone"),
        (["--checkpoint", "vqa", "--checkpoint", "vqa"], "both the head of vqa"),
        (["--checkpoint", "vqa", "--index", "index"], "retrieval checkpoint"),
        (["--checkpoint", "itr", "--index", "photos"], "is no index"),
        (["--checkpoint", "vqa", "--port", "65536"], "--port 65536"),
        (["--checkpoint", "vqa", "--max_upload", "0"], "--max_upload 0"),
        (["--checkpoint", "vqa", "--host", "nowhere.invalid"], "--host nowhere.invalid"),
        (["--checkpoint", "vqa", "--host", "192.0.2.1"], "--host 192.0.2.1"),
    ],
)
def test_a_wrong_option_is_one_line(
    options: list[str],
    expected: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    port = [] if "--port" in options else ["--port", "0"]
    assert predict("serve", *options, *port) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and expected in error and error.count("\n") == 1


def test_a_port_that_is_taken_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert predict("serve", "--checkpoint", folder / "vqa", "--port", port) == 2
    error = capsys.readouterr().err
    assert f"--port {port}: Address already in use" in error and error.count("\n") == 1
