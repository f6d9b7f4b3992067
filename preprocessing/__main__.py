"""`python -m preprocessing COMMAND`: raw data sets -> Arrow shards, and tools to look at them."""

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from preprocessing import coco, easy_vqa, inspect_shards, nlvr2, tokenizer_command, verify, vqav2, xvlm_json
from preprocessing.schema import DataError
from preprocessing.shapes import generate

COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "shapes": (generate, "generate the embedded data set, as raw files"),
    "coco": (coco, "COCO captions -> caption shards"),
    "vqav2": (vqav2, "VQA v2 -> VQA shards"),
    "nlvr2": (nlvr2, "NLVR2 -> NLVR shards"),
    "json": (xvlm_json, "X-VLM/ALBEF fine-tuning JSON -> shards of any kind"),
    "easy-vqa": (easy_vqa, "the PyPI package easy-vqa -> VQA shards"),
    "verify": (verify, "check a prepared data set: hashes, schema, every row"),
    "inspect": (inspect_shards, "show schema, counts and rows of a prepared data set"),
    "tokenizer": (tokenizer_command, "train or inspect a tokenizer"),
}


class _Parser(argparse.ArgumentParser):
    """Tells a usage error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 when `verify` found a fault, 2 on bad usage or bad input."""
    parser = _Parser(prog="python -m preprocessing", description="Raw data sets -> Arrow shards. README.md has more.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=summary, description=module.__doc__, formatter_class=_Raw))
    args = parser.parse_args(arguments)
    try:
        return COMMANDS[args.command][0].run(args) or 0
    except DataError as error:
        print(f"preprocessing {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `… | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


_Raw = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    sys.exit(main())
