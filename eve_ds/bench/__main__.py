"""Speed and memory of the parts, measured on this machine beside what they are compared with; and what is learned.

    python -m eve_ds.bench moe|attention|step|gemm|loader|probe|words [--json FILE] ...

Prints a table; the file is a list of rows with all figures, of `loader` one dictionary: milliseconds are medians,
shares are fractions. On a machine that does other work the figures say little: every row holds the load average that
the run began with. `probe` and `words` take no times: they test what a pre-trained model has learned of the shapes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from eve_ds.bench import attention, gemm, loader, machine, moe, probe, step, words
from eve_ds.bench.benchmark import Benchmark, print_table
from eve_ds.engine.environment import prepare_environment
from eve_ds.errors import UserError, run_command
from eve_ds.files import write_json
from eve_ds.option_errors import plain

BENCHMARKS: dict[str, Benchmark] = {
    "moe": moe.BENCHMARK,
    "attention": attention.BENCHMARK,
    "step": step.BENCHMARK,
    "gemm": gemm.BENCHMARK,
    "loader": loader.BENCHMARK,
    "probe": probe.BENCHMARK,
    "words": words.BENCHMARK,
}


def parse(argv: list[str]) -> tuple[Benchmark, Namespace]:
    """The benchmark that is asked for, and its options.

    Raises:
        UserError: unknown benchmark, unknown option, or a value that it does not take.
    """
    parser = _parser("python -m eve_ds.bench", __doc__ or "")
    commands = parser.add_subcommands(required=True, dest="benchmark")
    for name, benchmark in BENCHMARKS.items():
        command = _parser(f"python -m eve_ds.bench {name}", benchmark.description)
        command.add_argument("--json", help="write all figures to this file")
        command.add_argument("--threads", type=PositiveInt | None, help="of torch; all cores unless given")
        benchmark.add_options(command)
        commands.add_subcommand(name, command, help=benchmark.description.split("\n")[0])
    try:
        options = parser.parse_args(argv)
    except ArgumentError as error:
        raise UserError(f"{plain(error)} (--help lists the options)") from error
    return BENCHMARKS[options.benchmark], options[options.benchmark]


def _parser(program: str, description: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=program,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # launchers pass it; it means nothing here
    return parser


def _check_writable(path: Path) -> None:
    """Raises UserError before anything is measured, not after minutes. Makes no folder: more may be wrong yet."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"--json {path}: is no regular file; name another one")
        above = next(folder for folder in path.absolute().parents if folder.exists())
        for name in (*path.parts[1:-1], f".{path.name}.{'0' * 8}"):  # as it is first called
            (above / name).exists()  # raises where it is too long
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
