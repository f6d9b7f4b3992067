"""Rows of webdataset tars. The files of a key may be anywhere in a tar, and tars inside it are read, too."""

import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple, cast

import numpy as np

from preprocessing.errors import UserError
from preprocessing.formats.caption_columns import decode_json, decode_text, names_in_json
from preprocessing.formats.shard_rows import ENDINGS, MAX_TEXT, FoundImage, ShardRows, duplicate_key, unreadable_text
from preprocessing.images.image_refs import ImageRef, TarMember
from preprocessing.local_files import replace_surrogates
from preprocessing.running.storage import open_input

_DOTTED = tuple(f".{ending}" for ending in ENDINGS)
_TEXTS = ("txt", "json")
_KNOWN = frozenset((*ENDINGS, *_TEXTS))
_PACKED = ("tar.gz", "tgz", "tar.bz2", "tar.xz", "tar.zst", "zip")
_CHUNK = 1 << 20
_DEEPEST = 4  # tars in tars

Members = tuple[Any, ...]  # (ending, first byte, bytes) of each file of a key, flat: half the size of a dict


class _File(NamedTuple):
    """A file in a tar, or a link to one."""

    key: str
    ending: str
    offset: int
    size: int
    link: str | None = None


class TarRows(ShardRows):
    """Layout "webdataset". Kept of each image: its place in the tar and that of its text.

    A key ends at the first dot of a name.
    """

    fields = np.dtype(
        [("image", "i8"), ("image_bytes", "i8"), ("text", "i8"), ("text_bytes", "i4"), ("json", "?"), ("ending", "i1")]
    )

    def scan_shard(self, shard: str) -> Iterator[FoundImage]:
        try:
            with open_input(shard) as file:
                groups = self._groups(shard, file)
                _pair_folders(groups)
                for key, members in groups.items():
                    group = {members[at]: members[at + 1 : at + 3] for at in range(0, len(members), 3)}
                    found = self._found(shard, file, key, group)
                    if found is not None:
                        yield found
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{shard}: is no whole tar ({error}); fetch it again") from None

    def _groups(self, shard: str, file: IO[bytes]) -> dict[str, Members]:
        """key -> its images and texts, in the order of the first file of each key."""
        groups: dict[str, Members] = {}
        links = []
        for key, ending, offset, size, link in _files(shard, file):
            if ending in _KNOWN:
                members = groups.get(key, ())
                if link is not None:
                    links.append((key, ending, link))
                elif members and ending in members[::3]:
                    raise duplicate_key(shard, key)
                else:
                    groups[key] = (*members, ending, offset, size)
            elif "." in ending and ending.endswith(_DOTTED):
                self.count_left_out("image name has a second dot")
            elif ending.endswith(_PACKED):
                name = replace_surrogates(f"{key}.{ending}")
                raise UserError(f"{shard}: holds {name}, which is compressed; unpack it and put its files in a tar")
        for key, ending, link in links:
            source, source_ending = _key(link)
            there = groups.get(source, ())
            if source_ending not in there[::3]:
                self.count_left_out(f"{'text' if ending in _TEXTS else 'image'} is a link that leads nowhere")
                continue
            start = there.index(source_ending)
            if ending in groups.get(key, ())[::3]:
                raise duplicate_key(shard, key)
            groups[key] = (*groups.get(key, ()), ending, *there[start + 1 : start + 3])
        return groups

    def _found(self, shard: str, file: IO[bytes], key: str, group: dict[str, Members]) -> FoundImage | None:
        """The image of a key with its captions; None if it has no image."""
        ending = next((ending for ending in ENDINGS if ending in group), None)
        kinds = _TEXTS[1:] if self._wanted.columns else _TEXTS
        kind = next((kind for kind in kinds if kind in group), None)
        if ending is None:
            if kind is not None:
                self.count_left_out("text without image")
            return None
        image = (*group[ending], 0, 0, False, ENDINGS.index(ending))
        if kind is None:
            return FoundImage(key, (), image)
        offset, size = group[kind]
        found = FoundImage(key, (), (*group[ending], offset, size, kind == "json", ENDINGS.index(ending)))
        where = f"{shard}: {key}.{kind}"
        record = b""
        if group.get("json", (0, MAX_TEXT + 1))[1] <= MAX_TEXT:
            record = _read(file, *group["json"])
        if self._wanted.excluded:
            found.names = names_in_json(record)
        try:
            if size > MAX_TEXT:
                raise ValueError(f"has more than {MAX_TEXT >> 20} MiB")
            found.captions = self._captions(record if kind == "json" else _read(file, offset, size), kind == "json")
        except ValueError as error:
            found.fault = unreadable_text(where, error)
        self.note_split(found, record, where)
        return found

    def _captions(self, content: bytes, as_json: bool) -> Sequence[str]:
        """The captions in the bytes of a text. Raises ValueError when they cannot be read."""
        return decode_json(content, self._wanted.columns) if as_json else decode_text(content)

    def read_entry(self, shard: str, key: str, entry: Any) -> tuple[Sequence[str], ImageRef]:
        with open_input(shard) as file:
            content = _read(file, int(entry["text"]), int(entry["text_bytes"]))
        try:
            captions = self._captions(content, bool(entry["json"]))
        except ValueError:
            captions = ()  # the caller reports it
        name = f"{key}.{ENDINGS[int(entry['ending'])]}"
        return captions, TarMember(shard, int(entry["image"]), int(entry["image_bytes"]), name)


def _read(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    return bytes(file.read(size))


def _key(name: str) -> tuple[str, str]:
    """(key, ending in lower case) of a member's name."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending.lower()


def _files(
    shard: str, file: IO[bytes], start: int = 0, end: int | None = None, inside: str = "", depth: int = 0
) -> Iterator[_File]:
    """The files of a tar that begins at byte `start` of `file`, and those of the tars inside it, as in a folder.

    Hidden files, such as those of macOS (._1.txt), are skipped. Raises TarError when the tar is truncated or damaged.
    """
    nested = []
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            cast(Any, tar).members = []  # tarfile would keep every member in memory
            if member.size < 0:  # on which some versions of Python loop forever
                raise tarfile.TarError(f"a negative size at byte {member.offset}")
            if end is not None and member.offset_data + member.size > end:
                raise tarfile.TarError(f"the tar {replace_surrogates(inside)} in it is cut")
            name = posixpath.join(inside, member.name) if inside else member.name
            if name[name.rfind("/") + 1 :].startswith("."):
                continue
            key, ending = _key(name)
            if member.issparse():
                what = f"holds {replace_surrogates(name)} in pieces (sparse); pack it again without --sparse"
                raise UserError(f"{shard}: {what}")
            if member.isreg():
                if ending.endswith("tar") and name.lower().endswith(".tar"):
                    nested.append((name[:-4], member.offset_data, member.offset_data + member.size))
                else:
                    yield _File(key, ending, member.offset_data, member.size)
            elif member.islnk():
                yield _File(key, ending, 0, 0, posixpath.join(inside, member.linkname))
            elif member.issym():
                link = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
                yield _File(key, ending, 0, 0, link)
        _check_end(file, tar.offset, end)
    for name, first, last in nested:
        if depth == _DEEPEST:
            raise UserError(f"{shard}: holds tars in tars, {_DEEPEST + 1} deep; unpack {replace_surrogates(name)}.tar")
        yield from _files(shard, file, first, last, name, depth + 1)


def _check_end(file: IO[bytes], start: int, end: int | None) -> None:
    """Raise TarError unless only zeros follow byte `start`, where tarfile stopped, and at least one block of them.

    tarfile also stops at a damaged header, at the end of the file, and at a header that was overwritten with zeros.
    """
    file.seek(start)
    zeros = 0
    while data := bytes(file.read(_CHUNK if end is None else max(0, min(_CHUNK, end - start - zeros)))):
        if data.count(0) < len(data):
            raise tarfile.TarError(f"no header and no end at byte {start}, behind which more follows")
        zeros += len(data)
    if zeros < tarfile.BLOCKSIZE:
        raise tarfile.TarError(f"no end at byte {start}")


def _pair_folders(groups: dict[str, Members]) -> None:
    """Pair images in one folder of a tar with the texts of the same names in another folder.

    Only if no key has both, and each name is unique among images and among texts.
    """
    images: dict[str, str] = {}
    texts: dict[str, str] = {}
    for key, members in groups.items():
        endings = members[::3]
        is_image, is_text = any(ending in ENDINGS for ending in endings), any(kind in endings for kind in _TEXTS)
        stems = images if is_image else texts
        if (is_image and is_text) or posixpath.basename(key) in stems:
            return
        stems[posixpath.basename(key)] = key
    for stem in images.keys() & texts.keys():
        groups[images[stem]] += groups.pop(texts[stem])
