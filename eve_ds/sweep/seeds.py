"""Run one fine-tuning with several seeds, and print mean and standard deviation of its scores.

    python -m eve_ds.sweep seeds --seeds 3 --jobs 2 --out runs/vqa_seeds -- \\
        eve_ds.finetune --config vqa --checkpoint runs/base --data data/vqa
    python -m eve_ds.sweep seeds --seeds 3 --out runs/vqa_seeds -- \\
        deepspeed --num_gpus 8 --module eve_ds.finetune --config vqa --checkpoint runs/base --data data/vqa

What follows -- is the command of one run, without --seed and --output_dir: those are 0, 1, ... and OUT/seed_0, ... A
launcher may stand before eve_ds.finetune; --ranks starts several processes without one. Stopped, it goes on with the
same command; seeds that are done are not run again, and more --seeds run what is new. --print prints the commands that
are left and runs nothing. OUT/seeds.json has every score of every seed, OUT/seeds.md the table.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.common import Parser
from eve_ds.config import FinetuneConfig, parse
from eve_ds.environment import prepare_environment
from eve_ds.finetune_options import expand_options
from eve_ds.options import check_secrets
from eve_ds.sweep import runs
from eve_ds.sweep.stages import FINETUNE, MARKER, Stage, check_folder, launcher, number, read_json
from eve_ds.sweep.summary import MOST_SEEDS, lined_up, spread
from preprocessing.errors import UserError
from preprocessing.local_files import make_folder, write_json, write_text

NAME = "seeds"
GUARDED = ("deepspeed", "torchrun")  # launchers that lose signals: eve_ds/launching.py passes them on
BESIDE = {"about", "best", "incomplete", "intervals"}  # in a file of scores, and no group of metrics
OURS = ("--seed", "--engine.seed", "--output_dir")  # options that this command gives
SECOND = ("--output_hdfs", "--checkpoint.second_place")  # one place is for one run: each gets a folder of its own in it


def main(argv: list[str]) -> None:
    own = argv[: argv.index("--")] if "--" in argv else argv
    options = parser().parse_args(own)
    command = argv[len(own) + 1 :]
    check_secrets(command, "the command behind --")  # it is stored
    prepare_environment()
    stages, split = stages_of(command, options.out, options.seeds, options.ranks)
    check_folder(options.out, NAME)
    waiting = runs.left([[stage] for stage in stages])
    make_folder(options.out)
    write_json(options.out / MARKER, {"table": NAME})
    if options.print:
        print(*(f"# {stage.title}\n{stage.shown}" for lane in waiting for stage in lane), sep="\n")
        return
    runs.run(waiting, options.jobs, options.ranks if command[0] == FINETUNE else None)
    found = scores_of(stages)
    text = markdown(found, split, options.seeds)
    write_json(options.out / "seeds.json", {"command": shlex.join(command), "split": split, "metrics": found})
    write_text(options.out / "seeds.md", text)
    print(f"\n{text}\n  {options.out / 'seeds.json'}", flush=True)


def parser() -> Parser:
    found = Parser(prog="python -m eve_ds.sweep seeds", description=__doc__)
    found.add_argument("--seeds", type=number(MOST_SEEDS), default=3, help="number of seeds: 0, 1, ... (default 3)")
    found.add_argument("--jobs", type=number(), default=1, help="runs side by side (default 1)")
    found.add_argument("--ranks", type=number(), default=1, help="processes of a run, without a launcher (default 1)")
    found.add_argument("--out", type=Path, default=Path("runs/seeds"), help="folder of all runs (default runs/seeds)")
    found.add_argument("--print", action="store_true", help="print the commands that are left and run nothing")
    return found


def stages_of(command: Sequence[str], out: Path, seeds: int, ranks: int) -> tuple[list[Stage], str]:
    """A stage for each seed, and the split that they score.

    Args:
        command: of one run, a launcher before it or none.
        out: folder of the runs.
        seeds: their number.
        ranks: processes of a run, if no launcher tells.
    Raises:
        UserError: the command is none of a fine-tuning, gives what differs from seed to seed, or has a bad option.
    """
    if FINETUNE not in command:
        raise UserError(f"behind -- stands no {FINETUNE}; end the command with it and its options, as --help shows")
    place = list(command).index(FINETUNE)
    before, arguments = list(command[:place]), list(command[place + 1 :])
    for word in arguments:
        if word.partition("=")[0] in OURS:
            raise UserError(f"{word.partition('=')[0]} differs from seed to seed: leave it out; the runs go into --out")
    if before and ranks > 1:
        raise UserError(f"--ranks {ranks}: the launcher {before[0]} says how many; leave out one of them")
    if before and Path(before[0]).name in GUARDED:
        before = ["python", "-m", "eve_ds.launching", *before]
    parsed, defaults = expand_options([*arguments, "--output_dir", str(out)])
    config = parse(FinetuneConfig, parsed, f"python -m {FINETUNE}", defaults)
    split, second = config.split, config.checkpoint.second_place
    stages = []
    for seed in range(seeds):
        folder = out / f"seed_{seed}"
        own = [*without(arguments, SECOND), "--engine.seed", str(seed), "--output_dir", str(folder)]
        if second is not None:
            own += ["--output_hdfs", f"{second.rstrip('/')}/{folder.name}"]
        words = [*(before or launcher(ranks)), FINETUNE, *own]
        stages.append(Stage(f"seed {seed}", words, folder, folder / f"scores_{split}.json"))
    return stages, split


def without(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """The arguments but for these options and their values."""
    kept, value_follows = [], False
    for word in arguments:
        name, equals, _ = word.partition("=")
        if name in options:
            value_follows = not equals
        elif not value_follows:
            kept.append(word)
        else:
            value_follows = False
    return kept


def scores_of(stages: Sequence[Stage]) -> dict[str, dict[str, Any]]:
    """{metric: {"mean", "deviation" (None of one seed), "n", "values" by seed}} of the stages, all of which are done.

    The metrics of a group are ``GROUP/NAME``, as ``reranked/txt_r1``.

    Raises:
        UserError: a file of scores is damaged.
    """
    files = [_metrics(read_json(stage.product)) for stage in stages]
    found = {}
    for name in (name for name in files[0] if all(name in file for file in files)):
        values = [file[name] for file in files]
        found[name] = {**spread(values), "n": len(values), "values": values}
    return found


def _metrics(scores: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a file of scores, groups unfolded."""
    found: dict[str, Any] = {}
    for name, value in scores.items():
        if name in BESIDE:
            continue
        found |= {f"{name}/{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def markdown(found: dict[str, dict[str, Any]], split: str, seeds: int) -> str:
    """What ``scores_of`` found as a Markdown table with aligned columns."""
    lines = [[split, "mean ± deviation", "n", *(f"seed {seed}" for seed in range(seeds))]]
    for name, each in found.items():
        deviation = "" if each["deviation"] is None else f" ± {each['deviation']:.2g}"
        values = [f"{value:.4g}" for value in each["values"]]
        lines.append([name, f"{each['mean']:.4g}{deviation}", str(each["n"]), *values])
    return f"{lined_up(lines)}\n\nStandard deviation: of a sample (n - 1), over seeds.\n"
