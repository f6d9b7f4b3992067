"""Convert weights of other formats to EVE-DS model folders, and back.

A model folder holds model.safetensors, config.yaml and, if known, tokenizer.json; it loads without DeepSpeed.
"""

from __future__ import annotations

import sys
from argparse import HelpFormatter
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from eve_ds.convert.conversion import beit_to_folder, deepspeed_to_folder, folder_to_published, published_to_folder
from eve_ds.errors import run_command
from eve_ds.options import one_line
from preprocessing.errors import UserError

_PROGRAM = "python -m eve_ds.convert"
COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "from-published": (published_to_folder, "--checkpoint EVE.th --vlmo_config config_vlmo.json --out MODEL"),
    "to-published": (folder_to_published, "--checkpoint RUN --out EVE.th"),
    "from-deepspeed": (deepspeed_to_folder, "--checkpoint RUN/checkpoints/step_00001000 --out MODEL"),
    "from-beit": (beit_to_folder, "--checkpoint beitv2.pth --config eve_ds/configs/pretrain_base.yaml --out INITIAL"),
}


class _Parser(ArgumentParser):
    """Raises ArgumentError on bad usage; the help ends with examples."""

    def __init__(self, examples: list[str], **options: Any) -> None:
        super().__init__(exit_on_error=False, allow_abbrev=False, **options)
        self.examples = "".join(f"  {_PROGRAM} {example}\n" for example in examples)

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        return f"{super().format_help(formatter)}\nexamples:\n{self.examples}"


def _parser() -> ArgumentParser:
    examples = [f"{name} {example}" for name, (_, example) in COMMANDS.items()]
    parser = _Parser(examples, prog=_PROGRAM, description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subcommands(dest="command", title="commands", metavar="COMMAND")
    for name, (function, example) in COMMANDS.items():
        summary = (function.__doc__ or "").split("\n")[0]
        sub = _Parser([f"{name} {example}"], description=summary)
        sub.add_function_arguments(function, as_group=False, skip={"overwrite"})
        sub.add_argument("--overwrite", action="store_true", help="replace what is at --out")
        commands.add_subcommand(name, sub, help=summary)
    return parser


def main() -> None:
    try:
        parsed = _parser().parse_args(sys.argv[1:])
    except ArgumentError as error:
        line = one_line(error)
        for name in COMMANDS:
            line = line.replace(f"{name}.", "--")
        raise UserError(f"{line}; see {_PROGRAM} --help") from error
    COMMANDS[parsed.command][0](**vars(parsed[parsed.command]))


if __name__ == "__main__":
    run_command(main)
