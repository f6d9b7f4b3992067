"""Run a table of the EVE paper's ablations on a small data set, and print it beside the paper's.

    python -m eve_ds.sweep objective --seeds 3
    python -m eve_ds.sweep last_blocks --config base.yaml --data data/coco --tokenizer tokenizer --ranks 8 --print \\
        -- --deepspeed_config zero1

Each row and seed is a pre-training with the row's options and a fine-tuning, which is scored on the split test. Options
behind -- go to every pre-training. A sweep that was stopped goes on with the same command; what is done is not run
again. --print prints the commands that are left and runs nothing: submit them, then repeat the sweep without it.

One fine-tuning with several seeds, its mean and spread: python -m eve_ds.sweep seeds --help

tables:
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from pathlib import Path

from evaluation.common import Parser
from eve_ds.demo import FIRST_VALUES, StageRunner, clock, data_stages
from eve_ds.environment import prepare_environment
from eve_ds.errors import run_command
from eve_ds.options import check_secrets
from eve_ds.sweep import runs, seeds
from eve_ds.sweep.stages import MARKER, Settings, Stage, check_folder, lanes, number
from eve_ds.sweep.summary import MOST_SEEDS, markdown, table_of
from eve_ds.sweep.tables import MEASURES, TABLES
from preprocessing.errors import UserError
from preprocessing.local_files import make_folder, write_json, write_text
from preprocessing.text.tokenizer import FILE_NAME as TOKENIZER

RECIPE = "tiny_shapes"
WORLD_SEED = 10  # of the shapes; the recipes were chosen on 0, 1 and 2
# Recipe and folder of the shapes world, by the fine-tuning's task.
SHAPES = {
    "itr_coco": ("itr", "captions"),
    "itr_flickr": ("itr", "captions"),
    "vqa": ("vqa", "vqa"),
    "nlvr": ("nlvr", "nlvr"),
}


def main() -> None:
    argv = sys.argv[1:]
    if argv[:1] == [seeds.NAME]:
        seeds.main(argv[1:])
        return
    own = argv[: argv.index("--")] if "--" in argv else argv
    options = parser().parse_args(own)
    options.extra = tuple(argv[len(own) + 1 :])
    for name, value in vars(options).items():
        check_secrets(list(value) if isinstance(value, tuple) else f"{value}", f"--{name}")  # the commands are stored
    prepare_environment()
    table = TABLES[options.name]
    rows = chosen_rows(options)
    settings = settings_of(options)
    world = None if options.data else settings.out / "world"
    check_folder(settings.out, options.name)
    all_lanes = lanes(settings, table, rows, options.seeds)
    waiting = runs.left(all_lanes)
    make_folder(settings.out)
    write_json(settings.out / MARKER, {"table": options.name})
    if options.print:
        print_commands(waiting, world)
        return
    began = time.monotonic()
    if world is not None:
        draw_world(world)
    runs.run(waiting, options.jobs, options.ranks)
    figures = table_of(settings, table, rows, options.seeds)
    text = markdown(options.name, table, figures)
    write_json(settings.out / "table.json", {"table": options.name, "reference": table.reference, "rows": figures})
    write_text(settings.out / "table.md", text)
    print(f"\n{text}\n  {settings.out / 'table.json'}\n  {clock(time.monotonic() - began)}", flush=True)


def parser() -> Parser:
    listed = "\n".join(
        f"  {name:<18}{table.title}\n  {'':<18}rows: {' '.join(row_names(name))}" for name, table in TABLES.items()
    )
    found = Parser(prog="python -m eve_ds.sweep", description=f"{(__doc__ or '').rstrip()}\n{listed}")
    found.add_argument("name", choices=TABLES, metavar="NAME", help="table to run, see above")
    found.add_argument("--seeds", type=number(MOST_SEEDS), default=3, help="number of seeds: 0, 1, ... (default 3)")
    found.add_argument("--rows", help="rows to run, as in mim,separate (default all)")
    found.add_argument(
        "--tasks", default="itr_coco", help=f"fine-tunings, some of {','.join(MEASURES)} (default itr_coco)"
    )
    found.add_argument("--steps", type=number(), help="of each pre-training (default the recipe's)")
    found.add_argument("--finetune_steps", type=number(), help="of each fine-tuning (default the recipe's)")
    found.add_argument("--jobs", type=number(), default=1, help="runs side by side, of a CPU's cores (default 1)")
    found.add_argument("--ranks", type=number(), default=1, help="processes of a run, such as one a GPU (default 1)")
    found.add_argument("--out", type=Path, help="folder of the sweep (default runs/sweep_NAME)")
    found.add_argument("--print", action="store_true", help="print the commands that are left and run nothing")
    found.add_argument("--config", default=RECIPE, help=f"recipe of the pre-training (default {RECIPE})")
    found.add_argument("--data", help="prepared captions (default: shapes are drawn into OUT/world)")
    found.add_argument("--tokenizer", help="its folder; goes with --data")
    found.add_argument("--finetune_config", help="recipe of the fine-tuning, of one task (default tiny_shapes_...)")
    found.add_argument("--finetune_data", help="its prepared data (default: that of the shapes; for retrieval --data)")
    return found


def row_names(name: str) -> list[str]:
    return [FIRST_VALUES, *(row.name for row in TABLES[name].rows)]


def chosen_rows(options: argparse.Namespace) -> list[str]:
    """Names of the rows, in the table's order. Raises UserError for an unknown one."""
    known = row_names(options.name)
    named = options.rows.split(",") if options.rows is not None else known
    for name in named:
        if name not in known:
            raise UserError(
                f"--rows {options.rows}: table {options.name} has no row {name!r}; it has {','.join(known)}"
            )
    return [name for name in known if name in named]


def settings_of(options: argparse.Namespace) -> Settings:
    """Raises UserError for options that do not go together."""
    out = options.out or Path("runs") / f"sweep_{options.name}"
    tasks = dict.fromkeys(options.tasks.split(","))
    for task in tasks:
        if task not in MEASURES:
            raise UserError(f"--tasks {options.tasks}: {task!r} is none of {','.join(MEASURES)}")
    if (options.data is None) != (options.tokenizer is None):
        raise UserError("--data and --tokenizer go together: give both, or neither for shapes")
    if len(tasks) > 1 and (options.finetune_config or options.finetune_data):
        raise UserError(f"--finetune_config and --finetune_data are of one task; --tasks {options.tasks} names more")
    found = {}
    for task in tasks:
        recipe, folder = SHAPES[task]
        data = options.finetune_data or f"{out}/world/data/{folder}"
        if options.data and not options.finetune_data:
            if folder != "captions":
                raise UserError(f"--finetune_data is missing: --data holds captions, and --tasks {task} needs its own")
            data = options.data
        found[task] = options.finetune_config or f"tiny_shapes_{recipe}", data
    captions, tokenizer = f"{out}/world/data/captions", f"{out}/world/tokenizer"
    return Settings(
        out,
        options.config,
        options.data or captions,
        options.tokenizer or tokenizer,
        found,
        options.steps,
        options.finetune_steps,
        options.ranks,
        options.extra,
    )


def draw_world(world: Path) -> None:
    """Draw the shapes world, unless it is there and whole: its tokenizer is written last."""
    if not (world / "tokenizer" / TOKENIZER).is_file():
        shutil.rmtree(world, ignore_errors=True)
        StageRunner(data_stages(world, WORLD_SEED)).run()


def print_commands(waiting: list[list[Stage]], world: Path | None) -> None:
    """The commands that are left, in an order in which they can be run."""
    if world is not None and not (world / "tokenizer" / TOKENIZER).is_file():
        for drawing in data_stages(world, WORLD_SEED):
            print(f"# {drawing.title}", *(shlex.join(["python", *command]) for command in drawing.commands), sep="\n")
    for stage in (stage for lane in waiting for stage in lane):
        print(f"# {stage.title}\n{stage.shown}")


if __name__ == "__main__":
    run_command(main)
