"""Rows of folders with images, each with a .txt or .json file beside it."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from preprocessing.errors import UserError
from preprocessing.formats.caption_columns import decode_json, decode_text, names_in_json
from preprocessing.formats.shard_rows import ENDINGS, MAX_TEXT, FoundImage, ShardRows, unreadable_text
from preprocessing.images.image_refs import FileImage, ImageRef, join
from preprocessing.running.storage import names_in, open_input, storage_path

_TEXTS = ("txt", "json")


class FolderRows(ShardRows):
    """Layout "files". Kept of each image: its extension as it is spelled, and whether its text is JSON."""

    fields = np.dtype([("ending", "S4"), ("json", "?")])

    def scan_shard(self, shard: str) -> Iterator[FoundImage]:
        names = names_in(storage_path(shard))
        known = set(names)
        kinds = _TEXTS[1:] if self._wanted.columns else _TEXTS
        for name in names:
            stem, _, ending = name.rpartition(".")
            if not is_image(name):
                continue
            kind = next((kind for kind in kinds if f"{stem}.{kind}" in known), None)
            beside = f"{stem}.json"
            found = FoundImage(stem, (), (ending.encode(), kind == "json"))
            record: bytes | None = b""
            if kind is not None and beside in known:
                record = _read(join(shard, beside))
            if self._wanted.excluded:
                found.names = names_in_json(record or b"")
            if kind is not None:
                content = record if kind == "json" else _read(join(shard, f"{stem}.{kind}"))
                try:
                    found.captions = self._captions(content, kind == "json")
                except ValueError as error:
                    found.fault = unreadable_text(join(shard, f"{stem}.{kind}"), error)
                self.note_split(found, record or b"", join(shard, f"{stem}.{kind}"))
            yield found

    def _captions(self, content: bytes | None, as_json: bool) -> Sequence[str]:
        """The captions in the bytes of a file (None for a missing one). Raises ValueError when they cannot be read."""
        if content is None:
            return ()
        if len(content) > MAX_TEXT:
            raise ValueError(f"has more than {MAX_TEXT >> 20} MiB")
        return decode_json(content, self._wanted.columns) if as_json else decode_text(content)

    def read_entry(self, shard: str, key: str, entry: Any) -> tuple[Sequence[str], ImageRef]:
        path = join(shard, f"{key}.{'json' if entry['json'] else 'txt'}")
        try:
            captions = self._captions(_read(path), bool(entry["json"]))
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            captions = ()  # the caller reports it
        return captions, FileImage(join(shard, f"{key}.{entry['ending'].decode()}"))


def is_image(name: str) -> bool:
    """Whether a file is an image, by its name. Hidden files, such as those of macOS (._1.jpg), are not."""
    return name.rpartition(".")[2].lower() in ENDINGS and not name.startswith(".") and "." in name


def _read(path: str) -> bytes | None:
    """At most MAX_TEXT + 1 bytes of a file; None for a link that leads nowhere. Raises UserError."""
    try:
        with open_input(path) as file:
            return bytes(file.read(MAX_TEXT + 1))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); fix it, or move it away") from None
