"""Throughput of the EVE-DS loader and of other loaders, and the speed of packing and of opening shards."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from eve_ds.bench.benchmark import Benchmark, Column, Row
from eve_ds.bench.loader_baselines import RATE, Images
from eve_ds.bench.loader_images import ABOUT, SIZE
from eve_ds.bench.loader_process import ROOT, JobError, JobProcess, Settings
from preprocessing.errors import UserError

BASELINES = {"webdataset": "WebDataset", "streaming": "Streaming", "datasets": "Datasets"}
CONTROL = "bare_in_bench_environment"  # the bare loop in that environment: a control that both decode equally fast
_OURS_MODULE, _BASELINES_MODULE = "eve_ds.bench.loader_ours", "eve_ds.bench.loader_baselines"
_MIB = 2**20
Rounds = dict[str, dict[str, list[float]]]  # {job: {figure: its value in each round}}


def _add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", type=PositiveInt, default=512, help=f"JPEGs of {SIZE[0]} x {SIZE[1]} pixels; a round is one pass")
    add("--batch_size", type=PositiveInt, default=16, help="images per batch")
    add("--processes", type=PositiveInt | None, help="number of decoding processes of each loader (default: all cores)")
    add("--repeats", type=PositiveInt, default=9, help="timed rounds, alternating between the loaders (medians)")
    add("--warmup", type=NonNegativeInt, default=1, help="untimed rounds before them")
    add("--packing_copies", type=PositiveInt, default=8, help="number of names under which each JPEG is packed")
    add("--shards", type=PositiveInt, default=1000, help="shards, of 16,000 rows each, of the split that is opened")
    add("--work", default=str(ROOT / "runs" / "bench_loader"), help="folder for images, shards and logs; reused")
    bench_python = str(ROOT / ".venv-bench/bin/python")
    add("--bench_python", default=bench_python, help="interpreter for the other loaders (make bench-env)")
    add("--timeout", type=PositiveFloat, default=600.0, help="maximum seconds for one round of a loader")


def _rows(options: Namespace) -> Iterator[Row]:
    settings = _settings(options)
    bench_python = Path(options.bench_python)
    missing: dict[str, str] = {}
    photos = _make_images(settings, bench_python, options.timeout)
    candidates = _start_candidates(settings, bench_python, options.timeout, missing)
    versions = {name: job.versions for name, job in candidates.items()}
    rates = {name: found[RATE] for name, found in _in_turn(candidates, options, missing).items()}
    bare = statistics.median(rates["bare"])
    for name in ("bare", "ours", *BASELINES, CONTROL):
        figure = statistics.median(rates[name]) if name in rates else None
        yield {
            "name": name,
            "what": f"{name}: images/s",
            "figure": figure,
            "share": figure / bare if figure is not None else None,
            "of": f"not measured: {missing[name]}" if name in missing else "of bare",
            "not_measured": missing.get(name),
            "all": rates.get(name),
            "versions": versions.get(name),
            "photos": photos,
            "settings": {"batch_size": settings.batch_size, "processes": settings.processes, "images": settings.images},
        }
    yield _packing(settings, options)
    yield _opening(settings, options)


def _settings(options: Namespace) -> Settings:
    processes = options.processes or len(os.sched_getaffinity(0))
    drawn = importlib.util.find_spec("skimage") is None and not Path(options.bench_python).exists()
    work = Path(options.work).resolve()
    settings = Settings(
        work=str(work),
        image_folder=str(work / f"{'drawn' if drawn else 'photos'}-{options.images}"),
        images=options.images,
        batch_size=options.batch_size,
        processes=processes,
        packing_copies=options.packing_copies,
        shards=options.shards,
    )
    if settings.window < 2 * processes:
        least = (2 * settings.lead + 2 * processes) * options.batch_size
        raise UserError(
            f"--images {options.images}: too few for {processes} processes that read batches of {options.batch_size}; "
            f"give {least} or more, or a smaller --batch_size"
        )
    return settings


def _make_images(settings: Settings, bench_python: Path, timeout: float) -> str:
    """Create the images; returns their source. Uses scikit-image from either environment, if installed."""
    if importlib.util.find_spec("skimage") is not None or not bench_python.exists():
        Images(settings)
    else:
        _run_job(settings, f"{_BASELINES_MODULE}:Images", "images", bench_python, timeout, 0)
    about = json.loads((Path(settings.image_folder) / ABOUT).read_text(encoding="utf-8"))
    return str(about["photos"])


def _start_candidates(
    settings: Settings, bench_python: Path, timeout: float, missing: dict[str, str]
) -> dict[str, JobProcess]:
    """Start all candidates; those that fail are added to ``missing`` with the reason."""
    here = Path(sys.executable)
    wanted = {"bare": (f"{_BASELINES_MODULE}:Bare", here), "ours": (f"{_OURS_MODULE}:Ours", here)}
    wanted |= {name: (f"{_BASELINES_MODULE}:{job}", bench_python) for name, job in BASELINES.items()}
    wanted[CONTROL] = (f"{_BASELINES_MODULE}:Bare", bench_python)
    started: dict[str, JobProcess] = {}
    try:
        for name, (job, python) in wanted.items():
            if python == bench_python and not python.exists():
                missing[name] = f"{python} does not exist; create it with make bench-env"
                continue
            started[name] = JobProcess(name, job, settings, python, timeout)
            try:
                started[name].start()
            except JobError as error:
                started.pop(name).close()
                _record_failure(name, error, missing)
    except BaseException:
        for process in started.values():
            process.close()
        raise
    return started


def _record_failure(name: str, error: JobError, missing: dict[str, str]) -> None:
    """Add a failed baseline to ``missing``. Raises UserError for the two candidates that are always required."""
    if name in ("bare", "ours"):
        raise UserError(f"bench loader, {name}: {error}") from error
    missing[name] = str(error)


def _in_turn(jobs: dict[str, JobProcess], options: Namespace, missing: dict[str, str]) -> Rounds:
    """Run alternating rounds, so that a slowdown of the machine affects all jobs; then end the jobs."""
    found: Rounds = {name: {} for name in jobs}
    try:
        for turn in range(options.warmup + options.repeats):
            for name in list(found):
                try:
                    figures = jobs[name].round()
                except JobError as error:
                    del found[name]
                    _record_failure(name, error, missing)
                    continue
                if turn >= options.warmup:
                    for key, value in figures.items():
                        found[name].setdefault(key, []).append(value)
    finally:
        for job in jobs.values():
            job.close()
    return found


def _run_job(
    settings: Settings, job: str, name: str, python: Path, timeout: float, rounds: int
) -> dict[str, list[float]]:
    """Run ``rounds`` rounds of one job: {figure: values}. Raises UserError if it fails."""
    try:
        process = JobProcess(name, job, settings, python, timeout)
        try:
            process.start()
            figures = [process.round() for _ in range(rounds)]
        finally:
            process.close()
    except JobError as error:
        raise UserError(f"bench loader, {name}: {error}") from error
    return {key: [one[key] for one in figures] for key in figures[0]} if figures else {}


def _packing(settings: Settings, options: Namespace) -> Row:
    rounds = options.warmup + options.repeats
    found = _run_job(settings, f"{_OURS_MODULE}:Packing", "packing", Path(sys.executable), options.timeout, rounds)
    packed, hashed, written = (
        statistics.median(found[f"{what}_{RATE}"][options.warmup :]) for what in ("packing", "hashing", "writing")
    )
    return {
        "name": "packing",
        "what": "packing: images/s",
        "figure": packed,
        "share": packed / hashed,
        "of": f"of reading and hashing the same files, {hashed:.0f}/s; the disk alone takes {written:.0f}/s",
        "hashing_images_per_second": hashed,
        "writing_images_per_second": written,
    }


def _opening(settings: Settings, options: Namespace) -> Row:
    found = _run_job(
        settings, f"{_OURS_MODULE}:Opening", "opening", Path(sys.executable), options.timeout, options.repeats
    )
    # Seconds are medians; memory is that of the first time, in a process that has opened nothing yet.
    figures = {key: statistics.median(all_) if "seconds" in key else all_[0] for key, all_ in found.items()}
    opened, every = figures["open_resident_bytes"] / _MIB, figures["open_every_shard_resident_bytes"] / _MIB
    return {
        "name": "opening",
        "what": f"opening {settings.shards} shards: s",
        "figure": figures.pop("open_seconds"),
        "share": None,
        "of": f"{opened:.0f} MiB; with a row of each read {figures['open_every_shard_seconds']:.2f} s, {every:.0f} MiB",
        "open_shards": settings.shards,
        "open_rows": settings.shard_rows,
    } | figures


def document(rows: list[Row]) -> dict[str, Any]:
    """Content of the JSON file: a dictionary; ``images_per_second`` of each loader is null if not measured."""
    by_name = {row["name"]: row for row in rows}
    control, packing, opening = (by_name.pop(name) for name in (CONTROL, "packing", "opening"))
    rates = {name: by_name[name]["figure"] for name in ("ours", "bare", *BASELINES)}
    measured = [row for row in [*by_name.values(), control] if row["figure"] is not None]
    open_keys = [key for key in opening if key.startswith("open_")]
    return {
        RATE: rates,
        "open_seconds": opening["figure"],
        "packing_share": packing["share"],
        "ours_over": {name: rates["ours"] / rate for name, rate in rates.items() if rate and name != "ours"},
        "not_measured": {row["name"]: row["not_measured"] for row in by_name.values() if row["not_measured"]},
        f"{CONTROL}_{RATE}": control["figure"],
        f"packing_{RATE}": packing["figure"],
        f"reading_and_hashing_{RATE}": packing["hashing_images_per_second"],
        f"writing_{RATE}": packing["writing_images_per_second"],
        **{key: opening[key] for key in open_keys},
        f"all_{RATE}": {row["name"]: row["all"] for row in measured},
        "versions": {row["name"]: row["versions"] for row in measured},
        "photos": control["photos"],
        "settings": control["settings"],
        "machine": control["machine"],
    }


BENCHMARK = Benchmark(
    "Throughput of the loader, compared with a bare decode and transform loop and three other loaders.\n\n"
    "All use the same JPEGs, transform, decoder and number of processes, and are timed alternately. The other loaders\n"
    "run in their own environment (make bench-env); one that fails is listed with the reason. Also measures packing\n"
    "against reading and hashing, and opening many shards. The JSON file holds one dictionary, not a list of rows.",
    [
        Column("what", "", width=34),
        Column("figure", "figure", lambda value: f"{value:.3g}" if value < 10 else f"{value:.0f}"),
        Column("share", "share", lambda value: f"{value:.2f}"),
        Column("of", ""),
    ],
    _add_options,
    _rows,
    document,
)
