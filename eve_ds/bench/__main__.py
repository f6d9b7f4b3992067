"""Benchmark the parts of EVE-DS on this machine against baselines, or test what a pre-trained model has learned.

    python -m eve_ds.bench moe|attention|step|objective|gemm|loader|probe|words [--json FILE] ...

Prints a table. The JSON file holds a list of rows with all figures (for loader and objective: one dictionary).
Milliseconds are medians, shares are fractions. Other load on the machine distorts the figures: every row holds the load
average at the start of the run. probe and words measure no times: they test what a pre-trained model has learned of the
shapes world.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from eve_ds.bench import attention, gemm, loader, machine, moe, objective, probe, step, words
from eve_ds.bench.benchmark import Benchmark, print_table
from eve_ds.environment import prepare_environment
from eve_ds.errors import run_command
from eve_ds.options import one_line
from preprocessing.errors import UserError
from preprocessing.local_files import write_json

BENCHMARKS: dict[str, Benchmark] = {
    "moe": moe.BENCHMARK,
    "attention": attention.BENCHMARK,
    "step": step.BENCHMARK,
    "objective": objective.BENCHMARK,
    "gemm": gemm.BENCHMARK,
    "loader": loader.BENCHMARK,
    "probe": probe.BENCHMARK,
    "words": words.BENCHMARK,
}


def parse(argv: list[str]) -> tuple[Benchmark, Namespace]:
    """The chosen benchmark and its options.

    Raises:
        UserError: unknown benchmark or option, or an invalid value.
    """
    parser = _parser("python -m eve_ds.bench", __doc__ or "")
    commands = parser.add_subcommands(required=True, dest="benchmark")
    for name, benchmark in BENCHMARKS.items():
        command = _parser(f"python -m eve_ds.bench {name}", benchmark.description)
        command.add_argument("--json", help="JSON file for all figures")
        command.add_argument("--threads", type=PositiveInt | None, help="number of torch threads (default: all cores)")
        benchmark.add_options(command)
        commands.add_subcommand(name, command, help=benchmark.description.split("\n")[0])
    try:
        options = parser.parse_args(argv)
    except ArgumentError as error:
        raise UserError(f"{one_line(error)} (--help lists the options)") from error
    return BENCHMARKS[options.benchmark], options[options.benchmark]


def _parser(program: str, description: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=program,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # passed by launchers and ignored
    return parser


def _check_writable(path: Path) -> None:
    """Raise UserError before measuring, not minutes later. Creates no folder, since other checks may still fail."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"--json {path}: is not a regular file; name another one")
        above = next(folder for folder in path.absolute().parents if folder.exists())
        for name in (*path.parts[1:-1], f".{path.name}.{'0' * 8}"):  # the name of the temporary file
            (above / name).exists()  # raises if the name is too long
        with tempfile.NamedTemporaryFile(prefix=".eve-ds-", dir=above):
            pass
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror}); name another file") from error


def main(argv: list[str] | None = None) -> None:
    prepare_environment()
    benchmark, options = parse(sys.argv[1:] if argv is None else argv)
    if options.json:
        _check_writable(Path(options.json))
    machine.use_all_cores(options.threads)
    facts = machine.facts(machine.choose_device(options.get("device", "cpu")))
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rows = [row | {"machine": facts} for row in print_table(benchmark.columns, benchmark.rows(options))]
    if options.json:
        write_json(Path(options.json), benchmark.document(rows))
        print(f"wrote {options.json}")


if __name__ == "__main__":
    run_command(main)
