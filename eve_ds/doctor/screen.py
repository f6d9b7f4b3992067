"""The doctor's findings as one screen of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

GIB = 2**30


def screen(found: dict[str, Any]) -> str:
    """``found`` as ``eve_ds.doctor`` writes it to JSON."""
    parts = [
        ("Versions", versions(found)),
        ("Machine", machine(found)),
        ("Speeds", speeds(found)),
        ("Operations: the implementation in use, and faster ones", operations(found)),
        ("Notes", iter(found["notes"])),
        ("Known problems", faults(found)),
    ]
    blocks = [(title, [f"  {line}" for line in lines]) for title, lines in parts]
    return "\n".join("\n".join([title, *lines]) for title, lines in blocks if lines)


def versions(found: dict[str, Any]) -> Iterator[str]:
    names = dict(found["versions"])
    loose = ("NCCL", "CUDA", "nvcc", "driver")
    yield ", ".join(f"{name} {value or 'none'}" for name, value in names.items() if name not in loose)
    yield ", ".join(f"{name} {names[name] or 'none'}" for name in loose)


def machine(found: dict[str, Any]) -> Iterator[str]:
    cpu, memory = found["cpu"], found["memory"]
    features = [name if has else f"no {name}" for name, has in cpu["features"].items()]
    limit = f", limited to {cpu['quota_cores']:g} cores' time" if cpu["quota_cores"] else ""
    yield f"{cpu['model']}: {cpu['cores']} cores, {cpu['usable_cores']} usable{limit}; {', '.join(features)}"
    shared = f"/dev/shm {size(memory['shm_bytes'])}, {size(memory['shm_free_bytes'])} free"
    main = f"memory {size(memory['total_bytes'])}, {size(memory['available_bytes'])} available"
    yield f"{main}; {shared}; open files {memory['open_files']}"
    for index, gpu in enumerate(found["torch"].get("devices", [])):
        yield f"cuda:{index} {gpu['name']}, {size(gpu['bytes'])}, compute capability {gpu['capability']}"


def speeds(found: dict[str, Any]) -> Iterator[str]:
    measured = {
        name.removesuffix("_bytes_per_s").removesuffix("_flop_per_s").replace("_", " "): (
            f"{value / 1e9:.1f} GB/s" if name.endswith("bytes_per_s") else f"{value / 1e12:.3g} TFLOP/s"
        )
        for name, value in found["speeds"].items()
    }
    if measured:
        yield ", ".join(f"{name} {value}" for name, value in measured.items())
    if precision := found["torch"].get("best_precision"):
        yield f"engine.precision: auto is {precision} here"


def operations(found: dict[str, Any]) -> Iterator[str]:
    for name, entry in found["operations"].items():
        if "error" in entry:
            yield f"{name}: is unknown ({entry['error']})"
            continue
        others = [
            f"{other['name']}: {other['reason']}" + (f" ({other['how']})" if other["how"] else "")
            for other in entry["alternatives"]
            if not other["available"]
        ]
        yield f"{entry['operation']}: {entry['live']}" + ("; not " + "; not ".join(others) if others else "")


def faults(found: dict[str, Any]) -> Iterator[str]:
    for fault in found["faults"]:
        yield fault["found"]
        yield f"  fix: {fault['mend']}"
    if not found["faults"]:
        yield "none found"


def size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / GIB:.1f} GiB"
