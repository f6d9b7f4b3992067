"""Lists of images: to leave out of a data set (`--exclude`), or to keep (`--only`)."""

import argparse
import codecs
import re
from collections.abc import Iterable, Iterator
from typing import Any, cast

from preprocessing.errors import UserError, id_without_secrets
from preprocessing.formats.annotations import BadRecord, read_json, read_json_lines, text_lines
from preprocessing.images.image_folder import coco_key, image_key
from preprocessing.local_files import parse_json
from preprocessing.running.storage import StoragePath, open_input, storage_path
from preprocessing.sources.split_names import split_named

_FIRST = 1 << 20  # bytes: a first line of JSON that is longer is the whole file
_LINES = (".jsonl", ".ndjson")
_NUMBER = re.compile(r"[0-9]{1,11}")


def _name_forms(name: str) -> list[str]:
    """The forms in which lists have this name: as it is, without secrets (as shards have it), and the key of each."""
    return [form for one in dict.fromkeys([name, id_without_secrets(name)]) for form in (one, image_key(one))]


class ImageList:
    """Images named by list files. Counts which of them are matched."""

    def __init__(self, names: Iterable[str], file: str = "") -> None:
        self._lists = [_NameList(names, file)]

    @classmethod
    def joined(cls, lists: Iterable["ImageList"]) -> "ImageList":
        """One list of several; the matches of each are still counted separately."""
        whole = cls(())
        whole._lists = [part for one in lists for part in one._lists]
        return whole

    def __bool__(self) -> bool:
        return any(part.names for part in self._lists)

    def match(self, *names: str) -> bool:
        """Whether an image is in the list, and count the match. `names`: its file name, id or key."""
        if not self:
            return False
        forms = {form for name in names for form in _name_forms(name)}
        return sum(part.match(forms) for part in self._lists) > 0  # sum, not any: each list counts its matches

    def counts(self) -> Iterator[tuple[str, int, int]]:
        """(file, names in it, how many of them were matched) of each list."""
        yield from ((part.file, part.names, len(part.matched)) for part in self._lists)

    def example(self, file: str) -> str:
        """A name of the list `file`."""
        return next(part.first for part in self._lists if part.file == file)


class _NameList:
    """The names in one file. Maps each form of a name to the number of the image."""

    def __init__(self, names: Iterable[str], file: str) -> None:
        self.file = file
        self.first = ""
        self.names = 0
        self.matched: set[int] = set()
        self._image: dict[str, int] = {}
        for name in names:
            self.first = self.first or name
            forms = _name_forms(name)
            if _NUMBER.fullmatch(name):  # an id, which COCO's files have in their names
                forms.append(coco_key(int(name)))
            number = next((self._image[form] for form in forms if form in self._image), self.names)
            self.names += number == self.names
            for form in forms:
                self._image.setdefault(form, number)

    def match(self, forms: Iterable[str]) -> bool:
        """Whether one of `forms` is in the list, and count the image."""
        here = [self._image[form] for form in forms if form in self._image]
        self.matched.update(here)
        return bool(here)


def add_exclude_argument(parser: argparse.ArgumentParser) -> None:
    """Declare `--exclude` and `--allow-unmatched`."""
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="FILE",
        help="leave out the images that these files name: X-VLM JSON, COCO JSON, test split of a Karpathy JSON, the "
        "list of `duplicates find`, lines of X-VLM or NLVR2, or text with a name or id a line",
    )
    parser.add_argument(
        "--allow-unmatched", action="store_true", help="go on where none of a list's images is among the data set's"
    )


EXCLUDED = "image is listed in --exclude"


def excluded_images(args: argparse.Namespace) -> ImageList:
    """The images of all `--exclude` files; `args.excluded` has them too. Raises UserError naming the file at fault."""
    args.excluded = ImageList.joined(ImageList(read_image_names(_list_file(path)), path) for path in args.exclude)
    return cast(ImageList, args.excluded)


def _list_file(path: str) -> StoragePath:
    found = storage_path(path)
    if found.is_dir() or path.endswith(".npz"):
        raise UserError(f"{path}: is no list of names; prepared data sets and hashes go to --exclude-images-of")
    return found


def read_image_names(path: StoragePath) -> Iterator[str]:
    """The images that a list file names; see `add_exclude_argument`. Raises UserError when it is none of those."""
    first = _first_character(path) if path.name.endswith(_LINES) else ""
    lines = first == "{" or _is_lines(path)
    if not lines and first != "[" and not path.name.endswith(".json"):
        for _, line in text_lines(path):
            if isinstance(line, BadRecord):
                raise line
            yield from (name for part in line.splitlines() if (name := part.strip()))
        return
    content = [record for _, record in read_json_lines(path, _raise)] if lines else read_json(path)
    records = content
    if isinstance(content, dict):
        records = next((content[name] for name in ("images", "duplicates", "questions") if name in content), None)
    if not isinstance(records, list):
        raise UserError(f"{path}: is no list of images in a known form; give one image name a line in a .txt file")
    splits = {split_named(str(record["split"])) for record in records if isinstance(record, dict) and "split" in record}
    for index, record in enumerate(records):
        if "test" in splits and isinstance(record, dict) and split_named(str(record.get("split", "test"))) != "test":
            continue  # Karpathy's file holds all splits; a list of one split is taken as it is
        names = list(names_in_record(record))
        if not names:
            raise UserError(f"{path}: record {index}: names no image; give one image name a line in a .txt file")
        yield from names


def _first_character(path: StoragePath) -> str:
    """The first character that is no white space; "" for a file that cannot be read."""
    try:
        with open_input(path) as file:
            return bytes(file.read(_FIRST)).removeprefix(codecs.BOM_UTF8).lstrip()[:1].decode("latin-1")
    except OSError:
        return ""  # reported when the whole file is read


def _raise(error: BadRecord) -> None:
    raise error  # skipping it would keep the image that it names


def _is_lines(path: StoragePath) -> bool:
    """Whether the first of several lines is a complete record, as in X-VLM's and NLVR2's files."""
    try:
        with open_input(path) as file:
            first, end, more = bytes(file.read(_FIRST)).partition(b"\n")
        return bool(end and more.strip()) and isinstance(parse_json(first.removeprefix(codecs.BOM_UTF8)), dict)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        return False  # reported when the whole file is read


def names_in_record(record: Any) -> Iterator[str]:
    """The images that a record names, in any of the forms of `add_exclude_argument`."""
    if isinstance(record, str):
        yield record
    elif isinstance(record, dict):
        for name in ("file_name", "filename", "image_rpath", "image"):
            if isinstance(record.get(name), str):
                yield record[name]
                return
        if isinstance(record.get("images"), list):
            yield from (name for name in record["images"] if isinstance(name, str))
        elif isinstance(record.get("image_id"), str | int):
            yield str(record["image_id"])
        elif isinstance(record.get("identifier"), str):  # NLVR2: split-set-pair-sentence
            pair = record["identifier"].rpartition("-")[0]
            yield from (f"{pair}-img0.png", f"{pair}-img1.png")
