"""Use a trained model: raw images and texts in, text or JSON out. Needs no DeepSpeed; CPU or GPU.

    python -m eve_ds.predict answer photo.jpg "what color is the square?" --checkpoint runs/vqa --top 3
    python -m eve_ds.predict match photo.jpg "a red square" "two dogs" --checkpoint runs/itr
    python -m eve_ds.predict judge left.jpg right.jpg "both images have a circle" --checkpoint runs/nlvr
    python -m eve_ds.predict index photos --out photos.index --checkpoint runs/itr
    python -m eve_ds.predict search "a dog on a beach" --index photos.index --checkpoint runs/itr --html found.html
    python -m eve_ds.predict features *.jpg --texts captions.txt --checkpoint runs/itr --out features.npz
    python -m eve_ds.predict answer --input questions.jsonl --checkpoint runs/vqa > answers.jsonl
    python -m eve_ds.predict serve --checkpoint runs/vqa --checkpoint runs/itr --index photos.index

docs/predict.md describes every command.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evaluation.common import Parser
from eve_ds.errors import run_command
from eve_ds.predict.request_rows import (
    Request,
    Row,
    answers,
    as_json,
    as_text,
    computed,
    judgements,
    matches,
    read_requests,
)
from preprocessing.errors import UserError, printable

if TYPE_CHECKING:
    from eve_ds.predict.eve import EVE

PROGRAM = "python -m eve_ds.predict"
Options = argparse.Namespace
Compute = Callable[["EVE", Sequence[Row]], list[Row]]


class CommandParser(Parser):
    """Of a command: options may stand before, between and after its other arguments."""

    _within = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._within or "--" in (args or ()):  # which Python 3.11 does not keep for the second of the calls below
            return super().parse_known_args(args, namespace)
        self._within = True  # the call below calls this method, for options and for arguments
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._within = False


class Command(NamedTuple):
    """A command: what it does in a line, its own options, and what runs."""

    summary: str
    add_options: Callable[[Parser], None]
    run: Callable[[Options], None]


def _answer_options(parser: Parser) -> None:
    _inputs(parser, ("image", "question"))
    parser.add_argument("--top", type=int, default=5, metavar="N", help="answers to a question (default 5)")


def _match_options(parser: Parser) -> None:
    _inputs(parser, ("image",), row=("image", "text"))
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts to compare the image with")


def _judge_options(parser: Parser) -> None:
    _inputs(parser, ("image_0", "image_1", "statement"))


def _features_options(parser: Parser) -> None:
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    parser.add_argument("--texts", metavar="FILE", help="a text on each line; none may be blank")
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write, .npz or .arrow")


def _index_options(parser: Parser) -> None:
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="of image files; its subfolders, too")
    add("--out", required=True, metavar="INDEX", help="folder of the index; one that is there is brought up to date")
    add("--num_workers", type=int, metavar="N", help="decoding processes (default: one for each core)")
    add("--dtype", choices=("float32", "float16"), help="of the vectors (default float32)")


def _search_options(parser: Parser) -> None:
    add = parser.add_argument
    add("text", nargs="?", metavar="TEXT")
    add("--image", metavar="FILE", help="search for images like this one")
    add("--index", required=True, metavar="INDEX", help="folder that the command index has made")
    add("--k", type=int, default=10, metavar="N", help="images to a query (default 10)")
    add("--html", metavar="FILE", help="write the results as a page with thumbnails, too (100 queries at most)")
    add("--input", metavar="FILE", help='JSON lines with "text" or "image"; writes JSON lines')


def _serve_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--index", metavar="INDEX", help="folder that the command index has made, to search")
    add("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine alone)")
    add("--port", type=int, default=8000, metavar="N", help="default 8000; 0: any free one, which is printed")
    add("--max_upload", type=int, default=20, metavar="MB", help="of a request's images (default 20)")


def _inputs(parser: Parser, names: tuple[str, ...], row: tuple[str, ...] = ()) -> None:
    for name in names:
        parser.add_argument(name, nargs="?", metavar=name.upper())
    keys = ", ".join(f'"{name}"' for name in row or names)
    parser.add_argument(
        "--input", metavar="FILE", help=f"JSON lines with {keys}, in place of the arguments; writes JSON lines"
    )


def model_options(parser: Parser, several: bool = False) -> None:
    """The options that every command has; ``several``: of one that takes several checkpoints, and prints no results."""
    add = parser.add_argument
    more = "; may be given for each task" if several else ""
    add(
        "--checkpoint",
        required=True,
        action="append" if several else "store",
        metavar="PATH",
        help=f"run folder, model folder or weights file{more}",
    )
    if not several:
        add("--json", action="store_true", help="write JSON, an object a line")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    add("--batch_size", type=int, default=32, metavar="N", help="rows that are computed together (default 32)")
    add("--image_size", type=int, metavar="N", help="side of the images, pixels (default: the model's)")
    add("--max_pixels", type=int, metavar="N", help="refuse larger images (default: as in training)")
    add("--tokenizer", metavar="PATH", help="file or folder (default: beside the weights)")
    add("--vlmo_config", metavar="FILE", help="EVE's config_vlmo JSON, for published weights")
    add("--published", action="store_true", help="compute as the published code does (docs/predict.md)")


def load(options: Options, checkpoint: str | None = None) -> EVE:
    """The model that the options name, or the one of that checkpoint."""
    from eve_ds.predict.eve import EVE

    return EVE.from_pretrained(
        options.checkpoint if checkpoint is None else checkpoint,
        options.device,
        batch_size=options.batch_size,
        tokenizer=options.tokenizer,
        vlmo_config=options.vlmo_config,
        image_size=options.image_size,
        max_pixels=options.max_pixels,
        published=options.published,
    )


def _run_rows(options: Options, names: tuple[str, ...], arguments: list[Row], compute: Compute) -> None:
    """Compute rows, of ``--input`` or of the arguments, and write the results as they come."""
    given = [value is not None for row in arguments for value in row.values()]
    if (options.input is not None) == any(given) or any(given) != all(given):
        raise UserError(f"give either {' '.join(name.upper() for name in names)}, or --input FILE; see --help")
    eve = load(options)
    from_file = options.input is not None
    source = read_requests(options.input, names) if from_file else map(Request, arguments)
    written = as_json if options.json or from_file else as_text
    for rows in computed(source, eve.batch_size, functools.partial(compute, eve)):
        print("\n".join(map(written, rows)), flush=True)


def _answer(options: Options) -> None:
    names = ("image", "question")
    _run_rows(
        options, names, [{name: getattr(options, name) for name in names}], functools.partial(answers, top=options.top)
    )


def _match(options: Options) -> None:
    rows = [{"image": options.image, "text": text} for text in options.texts or [None]]
    _run_rows(options, ("image", "text"), rows, matches)


def _judge(options: Options) -> None:
    names = ("image_0", "image_1", "statement")
    _run_rows(options, names, [{name: getattr(options, name) for name in names}], judgements)


def _index(options: Options) -> None:
    from eve_ds.predict.index_command import update_index

    done = update_index(load(options), options.folder, options.out, options.num_workers, options.dtype)
    if options.json:
        print(json.dumps(vars(done)))
        return
    counts = ", ".join(f"{getattr(done, name)} {name}" for name in ("new", "changed", "kept", "removed"))
    place, rate = printable(options.out), done.images_per_second
    print(f"{place}: {done.images} images ({counts}, {done.broken} not readable), {rate:.0f} a second")


def _check_output(options: Options, name: str) -> None:
    """Raise UserError if the file to be written lies where an index or the model is: it might replace a part of it."""
    from eve_ds.predict.image_index import holds_index

    if (path := getattr(options, name)) is None:
        return
    # What is written replaces a link; one to a file of the model is refused nevertheless.
    places = {Path(os.path.realpath(os.path.dirname(path))), Path(os.path.realpath(path)).parent}
    for option in ("index", "checkpoint"):
        folder = getattr(options, option, None)
        if folder is not None and any(place.is_relative_to(os.path.realpath(folder)) for place in places):
            raise UserError(f"--{name} {path}: lies in --{option} {folder}, which is read; choose another folder")
    if any(map(holds_index, places)):
        raise UserError(f"--{name} {path}: lies in an index; choose another folder")


def _search(options: Options) -> None:
    from eve_ds.predict.search_command import search_images

    _check_output(options, "html")
    queries = [{name: value} for name in ("text", "image") if (value := getattr(options, name)) is not None]
    from_file = options.input is not None
    if len(queries) + from_file != 1:
        raise UserError("give one of TEXT, --image FILE and --input FILE; see --help")
    requests = read_requests(options.input, ("text", "image"), one_of=True) if from_file else map(Request, queries)
    search_images(lambda: load(options), options.index, requests, options.k, options.json or from_file, options.html)


def _features(options: Options) -> None:
    from eve_ds.predict.features_command import write_features

    _check_output(options, "out")
    write_features(lambda: load(options), options.images, options.texts, options.out, options.json)


def _serve(options: Options) -> None:
    from eve_ds.predict.serve_command import serve

    of_checkpoint = functools.partial(load, options)
    serve(of_checkpoint, options.checkpoint, options.index, options.host, options.port, options.max_upload)


COMMANDS = {
    "answer": Command("Answer a question about an image (VQA checkpoint).", _answer_options, _answer),
    "match": Command("Compare an image with texts (retrieval checkpoint).", _match_options, _match),
    "judge": Command("Say whether a statement is true of two images (NLVR checkpoint).", _judge_options, _judge),
    "index": Command("Make or update an index of a folder's images (retrieval checkpoint).", _index_options, _index),
    "search": Command("Find the images of an index by a text or an image.", _search_options, _search),
    "features": Command("Write unit vectors of images and texts (retrieval checkpoint).", _features_options, _features),
    "serve": Command("A web page to ask, match, judge and search, with attention maps.", _serve_options, _serve),
}


def main(arguments: list[str] | None = None) -> None:
    """The command ``python -m eve_ds.predict``."""
    parser = Parser(prog=PROGRAM, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandParser)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.summary, description=command.summary)
        command.add_options(sub)
        model_options(sub, several=name == "serve")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="PIL")  # an image is taken, or refused in our own words
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than cores: the user's choice
    COMMANDS[options.command].run(options)


if __name__ == "__main__":
    sys.exit(run_command(main))
