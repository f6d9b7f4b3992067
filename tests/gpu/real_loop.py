"""The real loop: ``eve_ds.pretrain`` over JPEGs of 256 pixels through the loader, with texts that fill 40 tokens.

    python -m tests.gpu.real_loop --work DIR [--micro_batches 256 32]

For each micro-batch, on a GPU plain and compiled: pairs a second (of the median step after the first ones), the share
of its time that the loop waits for data, the seconds to the first step, and the memory beside what ``eve_ds.plan``
says. Prints a JSON line, anew after each run: a run that fails, or the section's limit, costs no other run's figures.
Each is ended after its last measured step: its checkpoint and export are not measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.gpu.kit_sizes import kit_device, pretrain_options
from tests.gpu.photos import make_photos

WORDS = 45  # a token each and more than max_text_length, 40: every text is cut to that
GIB = 2**30
SECONDS = 240  # until a run must have done its steps


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and runs; emptied")
    parser.add_argument("--micro_batches", type=int, nargs="+", help="a run each (default 256 and 32)")
    options = parser.parse_args()
    device = kit_device() or torch.device("cpu")
    on_gpu = device.type == "cuda"
    work = options.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    began = time.monotonic()
    data = prepared(work, 4096 if on_gpu else 32)
    found: dict[str, Any] = {"preparation_seconds": time.monotonic() - began}
    workers = max(1, len(os.sched_getaffinity(0)) - 2)
    for size in options.micro_batches or ([256, 32] if on_gpu else [4]):
        shape = [f"--engine.micro_batch_size={size}", f"--engine.global_batch_size={size}"]
        common = [*pretrain_options(device), *shape, "--deepspeed_config=ds_configs/zero1.json", *data]
        for choice in ("off", "on") if on_gpu else ("off",):
            run = [*common, f"--engine.compile={choice}"]
            name = f"micro-batch {size}" + (", compiled" if choice == "on" else "")
            found[name] = measured(run, work / f"run{size}{choice}", workers, on_gpu)
            print(json.dumps(found), flush=True)
    return found


def failed(found: Any) -> bool:
    """Whether a run of these figures failed."""
    return isinstance(found, dict) and ("failed" in found or any(map(failed, found.values())))


def prepared(work: Path, count: int) -> list[str]:
    """Options that name shards and a tokenizer, made of ``count`` new images."""
    captions = make_photos(work / "raw", count, WORDS)
    images, data, tokenizer = work / "raw" / "images", work / "data", work / "tokenizer"
    processes = str(min(16, len(os.sched_getaffinity(0))))
    convert = ["json", "--task", "retrieval", "--annotations", str(captions), "--images", str(images)]
    convert += ["--split", "train", "--text-cleaning", "none", "--workers", processes, "--out", str(data)]
    words = ["tokenizer", "train", "--data", str(data / "train"), "--vocab-size", "400", "--out", str(tokenizer)]
    for command in (convert, words):
        subprocess.run([sys.executable, "-m", "preprocessing", *command], check=True, stdout=sys.stderr)
    return [f"--data.path={data}", f"--data.tokenizer={tokenizer}", "--data.val_split=null"]


def measured(options: list[str], output: Path, workers: int, on_gpu: bool) -> dict[str, Any]:
    skipped, counted = (12, 30) if on_gpu else (2, 4)
    steps = skipped + counted
    command = [sys.executable, "-m", "eve_ds.pretrain", *options, f"--output_dir={output}", "--logging.wandb=false"]
    command += [f"--data.num_workers={workers}", f"--optimizer.total_steps={10 * steps}", "--logging.eval_every=0"]
    command += ["--checkpoint.every=0", f"--logging.detail_every={counted // 2}"]
    began = time.monotonic()
    run = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    try:
        reached: dict[int, float] = {}
        while len(records := records_of(output)) < steps:
            for step in range(1, min(len(records), 2) + 1):
                reached.setdefault(step, time.monotonic() - began)
            if run.poll() is not None or time.monotonic() - began > SECONDS:
                return {"failed": f"{len(records)} of {steps} steps were done, exit code {run.poll()}"}
            time.sleep(0.02)
    finally:
        run.kill()
        run.wait()
    used = records[skipped:steps]
    batch = records[1]["samples"] - records[0]["samples"]
    seconds = statistics.median(record["step_seconds"] for record in used)
    pairs = batch / seconds
    memory = {key: value for record in records for key, value in record.items() if key.endswith("_gib")}
    peak = memory.get("perf/gpu_allocated_gib", memory["perf/cpu_rss_gib"])
    forecast = planned(options, output.parent / "plan.json", on_gpu)
    return {
        "step_ms": seconds * 1000,
        "pairs_per_second": pairs,
        "wait_fraction": statistics.fmean(record["data/wait_fraction"] for record in used),
        "seconds_to_first_step": reached[1],
        "seconds_to_second_step": reached[2],  # in which blocks are compiled: in the first, operations are counted
        "tflops": pairs * forecast["flops_per_sample"] / 1e12,
        "peak_gib": peak,
        "planned_gib": (planned_gib := forecast["memory"]["without_checkpointing"]["peak"] / GIB),
        "peak_over_planned": peak / planned_gib,
    }


def records_of(output: Path) -> list[dict[str, Any]]:
    """Of the steps, so far; an incomplete line at the end is none."""
    file = output / "metrics.jsonl"
    whole = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return [record for line in whole if "step_seconds" in (record := json.loads(line))]


def planned(options: list[str], file: Path, on_gpu: bool) -> dict[str, Any]:
    device = ["--world_size=1", f"--device={'gpu' if on_gpu else 'cpu'}", f"--json={file}"]
    subprocess.run([sys.executable, "-m", "eve_ds.plan", *options, *device], check=True, stdout=sys.stderr)
    return dict(json.loads(file.read_text(encoding="utf-8")))


if __name__ == "__main__":
    sys.exit(failed(main()))
