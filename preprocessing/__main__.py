"""`python -m preprocessing COMMAND`: raw data sets -> Arrow shards, and tools to look at them.

A COMMAND with a dot in it is the import path of a converter of one's own: docs/extending.md.
"""

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from preprocessing.commands import codes, duplicates, inspect, tokenizer_command, verify
from preprocessing.errors import UserError, printable
from preprocessing.local_files import replace_surrogates
from preprocessing.running.pool import run_under_mpi, started_by_mpi
from preprocessing.shapes import generate
from preprocessing.sources import (
    captioned_urls,
    coco,
    easy_vqa,
    flickr30k,
    img2dataset,
    nlvr2,
    own_data,
    text_lines,
    visual_genome,
    visual_genome_qa,
    vqav2,
    xvlm_json,
)

COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "shapes": (generate, "generate the embedded data set, as raw files"),
    "coco": (coco, "COCO captions -> caption shards"),
    "visual-genome": (visual_genome, "Visual Genome's region descriptions -> caption shards"),
    "sbu": (captioned_urls, "SBU captions -> caption shards"),
    "cc3m": (captioned_urls, "Conceptual Captions -> caption shards"),
    "cc12m": (captioned_urls, "Conceptual 12M -> caption shards"),
    "flickr30k": (flickr30k, "Flickr30k -> caption shards"),
    "img2dataset": (img2dataset, "img2dataset's output -> caption shards"),
    "texts": (text_lines, "text files, a sentence a line -> caption shards without images"),
    "vqav2": (vqav2, "VQA v2, with Visual Genome's questions if wanted -> VQA shards"),
    "visual-genome-qa": (visual_genome_qa, "Visual Genome's questions -> VQA shards"),
    "nlvr2": (nlvr2, "NLVR2 -> NLVR shards"),
    "json": (xvlm_json, "X-VLM/ALBEF fine-tuning JSON -> shards of any kind"),
    "own": (own_data, "a folder of images and one CSV or JSON file -> shards of any kind, split into train, val, test"),
    "easy-vqa": (easy_vqa, "the PyPI package easy-vqa -> VQA shards"),
    "verify": (verify, "check a prepared data set: hashes, schema, every row"),
    "duplicates": (duplicates, "find images of one prepared data set in another"),
    "codes": (codes, "add a visual tokenizer's codes to caption shards"),
    "inspect": (inspect, "show schema, counts and rows of a prepared data set"),
    "tokenizer": (tokenizer_command, "train or inspect a tokenizer"),
}


class _Parser(argparse.ArgumentParser):
    """Prints a usage error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 when `verify` found a fault, 2 on bad usage or bad input.

    Under mpirun, rank 0 runs it and the other ranks are its workers.
    """
    try:
        return run_under_mpi(lambda: _run(arguments)) if started_by_mpi() else _run(arguments)
    except UserError as error:
        print(f"preprocessing: {printable(str(error))}", file=sys.stderr)
        return 2


def _run(arguments: Sequence[str] | None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    _check_text(words)
    parser = _Parser(prog="python -m preprocessing", description="Raw data sets -> Arrow shards. README.md has more.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    known = COMMANDS | {name: (_own_source(name), "") for name in words[:1] if "." in name and name[0] != "-"}
    for name, (module, summary) in known.items():
        command = commands.add_parser(name, help=summary, description=module.__doc__, formatter_class=_Raw)
        if name in words:  # declaring those of all commands takes as long as converting a hundred images
            module.add_arguments(command)
    args = parser.parse_args(words)
    try:
        for option in ("out", "images"):
            if getattr(args, option, None) == "":  # pathlib would take it for the current folder
                raise UserError(f"--{option}: is empty; name a folder")
        return known[args.command][0].run(args) or 0
    except BrokenPipeError:  # of `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        what = _line_of(error) if isinstance(error, OSError) else error
        print(f"preprocessing {args.command}: {printable(str(what))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _own_source(name: str) -> ModuleType:
    """The module of that import path. Raises UserError when it cannot be imported, or is no converter."""
    try:
        module = importlib.import_module(name)
    except (ImportError, SyntaxError, TypeError) as error:  # TypeError: a path that begins with a dot
        raise UserError(
            f"{name}: cannot be imported ({error}); name a module below this folder or on PYTHONPATH as Python imports "
            "it, as in my_package.my_source"
        ) from None
    missing = [function for function in ("add_arguments", "run") if not callable(getattr(module, function, None))]
    if missing:
        raise UserError(f"{name}: has no function {' and no '.join(missing)}; docs/extending.md says what a source has")
    return module


def _line_of(error: OSError) -> str:
    """The message for an OSError that is not handled elsewhere."""
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror or ' '.join(str(error).split())}; fix that, or name another path"


def _check_text(words: Sequence[str]) -> None:
    """Raise UserError for a word that is not UTF-8: the provenance file, which is UTF-8, records the command."""
    for word in words:
        if replace_surrogates(word) != word:
            raise UserError(f"{word!r}: is not UTF-8 text; write it in UTF-8, or give the file another name")


_Raw = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    gc.freeze()  # the garbage collector then skips all that was imported
    sys.exit(main())
