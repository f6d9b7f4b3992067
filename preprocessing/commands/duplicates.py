"""`python -m preprocessing duplicates hash | find`: images of one prepared data set that are in another.

`find` lists exact duplicates (SHA-256) and near ones (two perceptual hashes) for a person to review. The reviewed list
can be passed to a converter as `--exclude`; `--near-duplicates-of` leaves out all of them without a review.
"""

import argparse
import base64
import html
import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from preprocessing.errors import UserError, id_without_secrets
from preprocessing.images.decoding import open_image, upright_rgb
from preprocessing.images.fingerprints import NEAR_DISTANCE, HashList
from preprocessing.local_files import dump_json, write_atomic
from preprocessing.running.pool import check_workers
from preprocessing.running.storage import StoragePath, storage_path
from preprocessing.shards.reader import hashes_of, read_images
from preprocessing.shards.schema import PILLOW_PIXELS

_THUMBNAIL = 200  # pixels, the longer side


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands of `duplicates`."""
    commands = parser.add_subparsers(dest="duplicates_command", required=True, metavar="hash|find")
    make = commands.add_parser("hash", help="write the hashes of prepared images, to use in the place of the images")
    make.add_argument("directory", nargs="+", metavar="DIR", help="prepared data sets or splits")
    make.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default 1)")
    make.add_argument("--out", required=True, metavar="FILE", help="the .npz file to write")
    find = commands.add_parser("find", help="list the images of DIR that are in another set")
    find.add_argument("directory", metavar="DIR", help="a prepared data set or split, such as COCO's train")
    find.add_argument("--of", nargs="+", required=True, metavar="DIR", help="evaluation sets, or lists of hashes")
    find.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default 1)")
    find.add_argument("--out", required=True, metavar="FILE", help="the .json file to write")
    find.add_argument("--html", metavar="FILE", help="also write a page that shows the pairs")
    find.add_argument("--distance", type=int, default=NEAR_DISTANCE, metavar="BITS", help="of 64; 0 to 32 (default 6)")


def run(args: argparse.Namespace) -> None:
    """Run one subcommand. Raises UserError on bad input."""
    check_workers(args.workers)
    if args.duplicates_command == "hash":
        if not args.out.endswith(".npz"):
            raise UserError(f"--out {args.out}: must end in .npz, by which such lists are known")
        hashes = HashList.joined(hashes_of(storage_path(name), workers=args.workers) for name in args.directory)
        hashes.save(storage_path(args.out))
        print(f"{args.out}: hashes of {len(hashes)} images")
        return
    if not 0 <= args.distance <= 32:
        raise UserError(f"--distance {args.distance}: must be between 0 and 32 bits")
    others = [storage_path(name) for name in args.of]
    pairs = list(find_pairs(storage_path(args.directory), others, args.distance, args.workers))
    write_atomic(args.out, dump_json({"duplicates": [pair.as_json() for pair in pairs]}))
    if args.html:
        write_atomic(args.html, _page(storage_path(args.directory), pairs).encode())
    exact = sum(pair.exact for pair in pairs)
    print(f"{args.out}: {exact} exact and {len(pairs) - exact} near duplicates of {', '.join(args.of)}")


@dataclass(frozen=True)
class Pair:
    """An image of the set that is searched, and the most similar image of the other sets."""

    image_id: str
    of: str  # the set of the other image
    of_image: str
    exact: bool
    distance: int  # bits, the larger one of the two hashes

    def as_json(self) -> dict[str, Any]:
        """The pair for JSON, without secrets: an id may be a URL with a password."""
        return {name: id_without_secrets(one) if isinstance(one, str) else one for name, one in asdict(self).items()}


def find_pairs(directory: StoragePath, others: list[StoragePath], distance: int, workers: int = 1) -> Iterator[Pair]:
    """Each image of `directory` that is in `others`, or within `distance` bits of an image there. Raises UserError."""
    lists = [hashes_of(path, workers=workers) for path in others]
    hashes = HashList.joined(lists)
    set_of = [str(path) for path, one in zip(others, lists, strict=True) for _ in range(len(one))]
    exact = {int(key): index for index, key in reversed(list(enumerate(hashes.keys)))}
    own = hashes_of(directory, workers=workers)
    for key, dhash, phash, name in zip(own.keys, own.dhash, own.phash, own.names, strict=True):
        found = (exact[int(key)], 0) if int(key) in exact else next(hashes.near(dhash, phash, distance), None)
        if found is not None:
            index, bits = found
            yield Pair(str(name), set_of[index], str(hashes.names[index]), int(key) in exact, bits)


def _page(directory: StoragePath, pairs: list[Pair]) -> str:
    """A page with both images of each pair, except images of sets that are given as hashes."""
    folders = {str(directory)} | {pair.of for pair in pairs if not pair.of.endswith(".npz")}
    wanted = {(str(directory), pair.image_id) for pair in pairs} | {(pair.of, pair.of_image) for pair in pairs}
    thumbnails = {
        (folder, name): _thumbnail(data)
        for folder in sorted(folders)
        for name, data in read_images(storage_path(folder))
        if (folder, name) in wanted
    }
    rows = "".join(
        f"<tr><td>{thumbnails[str(directory), pair.image_id]}<br>{_text(pair.image_id)}"
        f"<td>{thumbnails.get((pair.of, pair.of_image), '')}<br>{_text(f'{pair.of}: {pair.of_image}')}"
        f"<td>{'exact' if pair.exact else f'{pair.distance} bits'}"
        for pair in pairs
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Duplicates</title>'
        "<style>body{font:14px system-ui,sans-serif}td{padding:.5rem;border-bottom:1px solid #ddd}</style>"
        f"<h1>{html.escape(str(directory))}: {len(pairs)} duplicates</h1><table>{rows}</table></html>\n"
    )


def _text(name: str) -> str:
    return html.escape(id_without_secrets(name))


def _thumbnail(data: bytes) -> str:
    image: Image.Image = upright_rgb(open_image(data, PILLOW_PIXELS))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
