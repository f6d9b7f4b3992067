"""`python -m preprocessing inspect DIR`: schema, counts and a few rows; with --html a page with thumbnails."""

import argparse
import base64
import html
import io
import json
from collections.abc import Iterator
from itertools import islice, zip_longest
from typing import Any

from preprocessing.errors import UserError, printable, without_secrets
from preprocessing.formats.annotations import read_json
from preprocessing.images.decoding import BadImage, decode_image
from preprocessing.local_files import write_atomic
from preprocessing.running.storage import StoragePath, storage_path
from preprocessing.shards.reader import code_grid, read_rows, split_folders
from preprocessing.shards.schema import (
    CODES,
    IMAGE_COLUMNS,
    KINDS,
    MODALITIES,
    PILLOW_PIXELS,
    PROVENANCE,
    SAMPLE_COLUMN,
    read_manifest,
)

_ROWS, _PAGE_ROWS = 3, 48
_THUMBNAIL = 160  # pixels, the longer side
_STYLE = """body{font:14px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#222}
table{border-collapse:collapse}td,th{border-bottom:1px solid #ddd;padding:.3rem .8rem;text-align:left}
.rows{display:grid;grid-template-columns:repeat(auto-fill,minmax(21rem,1fr));gap:1rem}
.row{border:1px solid #ddd;border-radius:.4rem;padding:.7rem;overflow-wrap:anywhere}
.row img{image-rendering:pixelated;margin:0 .4rem .4rem 0;min-width:4rem}ul{margin:.3rem 0;padding-left:1.2rem}
.id,.a{color:#777}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `inspect`."""
    parser.add_argument("directory", metavar="DIR", help="a data set folder or URI, or one split of it")
    parser.add_argument(
        "--rows", type=int, metavar="N", help=f"rows shown of each split (default {_ROWS}; on the page {_PAGE_ROWS})"
    )
    parser.add_argument("--html", metavar="FILE", help="also write a self-contained page with thumbnails")


def run(args: argparse.Namespace) -> None:
    """Print a summary and a few rows of each split, and write the page. Raises UserError."""
    if args.rows is not None and args.rows < 0:
        raise UserError(f"--rows {args.rows}: must be 0 or more")
    folders = split_folders(storage_path(args.directory))
    sections = []
    for folder in folders:
        manifest = read_manifest(folder)
        print("\n".join(map(printable, _summary(folder, manifest))))
        for row in islice(_rows(folder, manifest), _ROWS if args.rows is None else args.rows):
            print("  " + printable(json.dumps(_described(row), ensure_ascii=False)))
        if args.html:
            shown = islice(_rows(folder, manifest), _PAGE_ROWS if args.rows is None else args.rows)
            sections.append(_section(folder, manifest, [_card(manifest["kind"], row) for row in shown]))
    if args.html:
        title = html.escape(str(args.directory))
        head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        write_atomic(args.html, f"{head}<h1>{title}</h1>{''.join(sections)}</html>\n".encode())
        print(f"{args.html}: page written")


def _rows(folder: StoragePath, manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for shard in manifest["shards"]:
        yield from read_rows(folder / shard["file"], manifest["kind"])


def _summary(folder: StoragePath, manifest: dict[str, Any]) -> list[str]:
    size = sum(shard["bytes"] for shard in manifest["shards"]) / 1e6
    lines = [
        f"{folder}: {manifest['kind']}, split {manifest['split']}"
        + (f", {MODALITIES[manifest['modality']]}" if "modality" in manifest else ""),
        f"  {manifest['rows']} rows, {manifest['samples']} samples, {len(manifest['shards'])} shards, {size:.1f} MB",
        "  columns: " + ", ".join(f"{column.name} {column.type}" for column in KINDS[manifest["kind"]]),
    ]
    if grid := code_grid(folder, manifest):
        lines.append(f"  and {CODES} {grid.field.type}: {grid}")
    lines += [f"  dropped: {count} ({reason})" for reason, count in sorted(manifest["dropped"].items())]
    if (folder / PROVENANCE).exists():
        lines.append(f"  made by: {_made_by(folder / PROVENANCE)}")
    return lines


def _made_by(path: StoragePath) -> str:
    try:
        made = read_json(path)
    except UserError:
        made = None
    if not isinstance(made, dict):
        return f"unknown, {path.name} cannot be read"
    return f"{made.get('command')} on {made.get('time')}"


def _described(row: dict[str, Any]) -> dict[str, Any]:
    """The row with a description in the place of each image, and of its codes."""
    shown = {name: _describe(value) if isinstance(value, bytes) else value for name, value in row.items()}
    if row.get(CODES):
        shown[CODES] = f"{len(row[CODES])} codes, {len(set(row[CODES]))} of them different"
    return shown


def _describe(data: bytes) -> str:
    if not data:
        return "none"
    try:
        image = decode_image(data, PILLOW_PIXELS)
    except BadImage as error:
        return f"{error}, {len(data)} bytes"
    return f"{image.width}x{image.height} {image.mode}, {len(data)} bytes"


def _section(folder: StoragePath, manifest: dict[str, Any], cards: list[str]) -> str:
    facts = [
        ("kind", manifest["kind"]),
        ("rows", manifest["rows"]),
        ("samples", manifest["samples"]),
        *((f"dropped: {reason}", count) for reason, count in sorted(manifest["dropped"].items())),
        *((f"source: {name}", count) for name, count in sorted(manifest.get("source", {}).items())),
    ]
    table = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>" for name, value in facts
    )
    return f'<h2>{html.escape(folder.name)}</h2><table>{table}</table><div class="rows">{"".join(cards)}</div>'


def _card(kind: str, row: dict[str, Any]) -> str:
    images = "".join(_thumbnail(row[column]) for column in IMAGE_COLUMNS[kind])
    texts, answers = row[SAMPLE_COLUMN[kind]] or [], row.get("answers") or []
    if kind == "vqa":
        answers = [_scored(*pair) for pair in zip_longest(answers, row["answer_scores"] or [])]
    items = "".join(
        f"<li>{html.escape(str(text))}"
        + ("" if kind == "caption" else f" <span class=a>{html.escape(str(answer))}</span>")
        for text, answer in zip_longest(texts, answers)
    )
    name = next(iter(row["identifier"] or []), None) if kind == "nlvr" else row["image_id"]
    shown = html.escape(without_secrets(str(name)))
    return f'<div class="row">{images}<div class=id>{shown}</div><ul>{items}</ul></div>'


def _scored(answers: list[str | None] | None, scores: list[float | None] | None) -> str:
    pairs = zip_longest(answers or [], scores or [])
    return ", ".join(f"{answer} {score and f'{score:.1f}'}" for answer, score in pairs) or "no listed answer"


def _thumbnail(data: bytes | None) -> str:
    if not data:
        return "<em>is null</em>" if data is None else ""
    try:
        image = decode_image(data, PILLOW_PIXELS).convert("RGB")
    except BadImage as error:
        return f"<em>{error}</em>"
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
