"""A plan as text."""

from __future__ import annotations

from typing import Any

WIDTH = 44
MEMORY = {
    "weights": "weights",
    "optimizer": "optimizer (master copy, moments, averages)",
    "gradients": "gradients",
    "communication": "communication buffers",
    "activations": "activations and intermediate results",
    "peak": "peak",
    "forward": "kept by the forward pass",
    "step": "optimizer step, in place of the last three",
    "host": "on the host",
}
PARTS = {
    "data": "data: images, decoded by the loaders",
    "host": "host: launches, and a step's fixed cost",
    "exchange": "exchange: what is sent, at full link speed",
    "arithmetic": "arithmetic: the device busy",
}


def as_text(plan: dict[str, Any]) -> str:
    """The tables that ``python -m eve_ds.plan`` prints."""
    run = plan["run"]
    lines = [
        f"{run['task']}: {run['world_size']} ranks, ZeRO {run['zero_stage']}, experts over "
        f"{run['expert_parallel_size']}, {run['precision']}, {run['device']}",
        f"{run['global_batch_size']} samples a step: {run['micro_batch_size']}"
        f"{' (auto)' if run['micro_batch_size_is_auto'] else ''} a rank at once x "
        f"{run['gradient_accumulation_steps']} accumulated; texts of {run['text_length']} tokens",
        *_parameters(plan["parameters"]),
        *_memory(plan),
        "",
        "Sent by a rank in a step",
        *(_line(name, _size(size)) for name, size in plan["sent_per_step"].items()),
        _line("together", _size(sum(plan["sent_per_step"].values()))),
        "",
        "On disk",
        _line("a checkpoint, of all ranks together", _size(plan["checkpoint"])),
        *_work(plan),
    ]
    return "\n".join(lines)


def _parameters(parameters: dict[str, int]) -> list[str]:
    total = parameters["dense"] + parameters["experts"]
    return [
        "",
        "Parameters",
        _line("dense (heads included)", f"{parameters['dense'] / 1e6:.1f} M"),
        _line("experts", f"{parameters['experts'] / 1e6:.1f} M"),
        _line("together", f"{total / 1e6:.1f} M"),
        _line("of the backbone, active per token", f"{parameters['active'] / 1e6:.1f} M"),
    ]


def _memory(plan: dict[str, Any]) -> list[str]:
    plain, recomputed = plan["memory"]["without_checkpointing"], plan["memory"]["with_checkpointing"]
    lines = ["", f"{'Memory of a rank':{WIDTH}} {'plain':>12} {'checkpointed':>14}"]
    for key, name in MEMORY.items():
        if key != "host" or plain[key]:
            lines.append(_line(name, _size(plain[key]), _size(recomputed[key])))
    least = _size(plan["device_memory"])
    reserve = f", less {_size(plan['reserve'])} assumed for the runtime" if plan["reserve"] else ""
    most = "largest_micro_batch_size"
    lines.append(_line("largest micro-batch that fits", _rows(plain[most]), _rows(recomputed[most])))
    lines.append(f"  in {least}{reserve}; experts evenly loaded")
    return lines


def _work(plan: dict[str, Any]) -> list[str]:
    speed, ranks, rate = plan["speed"], plan["run"]["world_size"], plan["samples_per_second"]
    lines = ["", "Work", _line("operations per sample", f"{plan['flops_per_sample'] / 1e9:.1f} GFLOP")]
    lines += ["", "Seconds of a step by what takes them, if nothing overlaps"]
    for name, seconds in speed["seconds"].items():
        most = ["<- bottleneck"] if name == speed["bottleneck"] else []
        lines.append(_line(PARTS[name], f"{seconds:.3g}", *most))
    lines += ["", "Expected"]
    if rate is None:
        return [*lines, "  --peak_tflops is not given: eve_ds.bench step measures that of a CPU"]
    lines += [
        _line(f"share of {plan['peak_tflops']:g} TFLOP/s", f"{plan['mfu']:.1%}"),
        _line("seconds a step", f"{speed['step_seconds']:.3g}"),
        _line("samples/s: all ranks, one", *(f"{r:,.0f}" if r >= 100 else f"{r:.3g}" for r in (rate, rate / ranks))),
        _line("loader processes that feed a rank", f"{speed['loader_processes']:.1f}"),
    ]
    if plan["days"] is not None:
        lines.append(_line(f"days for {plan['pairs'] / 1e6:.4g} M samples", f"{plan['days']:.3g}"))
    lines += [f"  {line}" for line in speed["source"].split("; ")]
    if (alone := speed["mfu_forward_backward"]) is not None:
        lines.append(f"  forward and backward alone: {alone:.1%}")
    return lines


def _line(name: str, *values: str) -> str:
    columns = [f"{values[0]:>12}", *(f"{value:>14}" for value in values[1:])]
    return f"  {name:{WIDTH - 2}} {' '.join(columns)}"


def _rows(rows: int) -> str:
    return str(rows) if rows else "none"


def _size(size: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}" if size < 10 * unit else f"{size / unit:.1f} {name}"
    return f"{size} B"
