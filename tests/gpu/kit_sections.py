"""The sections of the kit, cheap and important ones first: what is right, then how fast it is, the longest last."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.gpu.kit_runner import Section


def sections(device: str, work: Path) -> list[Section]:
    """All sections for ``device``, cuda or cpu; their data lie in ``work``."""
    found = [*_checks(device), *_runs(device, work)]
    # A dry run's limits are those of a hang, however slow the machine: there is no card to give back in time.
    return found if device == "cuda" else [replace(section, limit=8 * section.limit) for section in found]


def _pytest(name: str, about: str, limit: float, *arguments: str, on_cpu: bool = True) -> Section:
    command = ["-m", "pytest", "-q", "-m", "not long", "-p", "no:cacheprovider", *arguments]
    return Section(name, about, command, limit, on_cpu=on_cpu)


def _checks(device: str) -> list[Section]:
    feeding = ["tests/gpu/test_feeding.py", "tests/gpu/test_attention_guard.py"]
    repeated, beyond = "tests/gpu/test_deterministic.py", "tests/gpu/test_large_shapes.py"
    unit = ["tests/unit/eve_ds/kernels", "tests/unit/eve_ds/model", "-n", "4" if device == "cuda" else "2"]
    return [
        _pytest("kernels", "kernels at Base sizes against float64", 90, "tests/gpu/test_kernels_at_size.py"),
        _pytest("attention", "attention over lengths and scores", 90, "tests/gpu/test_attention_at_size.py"),
        _pytest("tasks", "each task against float64 on the CPU", 60, "tests/gpu/test_tasks_on_device.py"),
        _pytest("zero", "ZeRO 1, 2, 3 against a plain loop", 90, "tests/gpu/test_zero_on_one_device.py"),
        _pytest("not-finite", "no step by such gradients", 60, "tests/gpu/test_not_finite_on_device.py"),
        _pytest("feeding", "batches and attention's guard on the device", 120, *feeding, on_cpu=False),
        _pytest("compiled", "compiled blocks against plain ones", 180, "tests/gpu/test_compiled_on_device.py"),
        _pytest("launches", "launches, waits, time by kind", 120, "tests/gpu/test_launches.py"),
        _pytest("unit", "unit tests of kernels and model", 180, *unit),
        _pytest("deterministic", "engine.deterministic: the same bits", 150, repeated, on_cpu=False),
        _pytest("large", "tensors of more than 2^31 elements", 60, beyond, on_cpu=False),
    ]


def _runs(device: str, work: Path) -> list[Section]:
    on_gpu, where = device == "cuda", ["--device", device]
    layer = [] if on_gpu else ["--dim", "32", "--hidden", "64", "--experts", "4", "--squares", "64"]
    tokens = ["--tokens", *(["9480", "30336", "98592"] if on_gpu else ["474"]), "--rivals_up_to", "98592"]
    heads = [] if on_gpu else ["--dim", "32", "--heads", "4", "--batch", "2", "--tokens", "50", "--squares", "64"]
    pairs = ["--pairs", "32", "64", "128", "256"] if on_gpu else ["--pairs", "1"]
    model = [] if on_gpu else ["--config", "tests/e2e/tiny.yaml", "--squares", "64"]
    step = [*model, *where, *pairs, "--no_plain", "--no_optimizer", *(["--compile"] if on_gpu else [])]
    images = ["--images", "1024", "--processes", "14", "--batch_size", "64", "--repeats", "5"]
    few_images = ["--images", "16", "--processes", "1", "--batch_size", "2", "--repeats", "2"]
    loader = [*(images if on_gpu else few_images), "--packing_copies", "1", "--shards", "2"]
    loop = ["-m", "tests.gpu.real_loop", "--work", str(work / "loop")]
    small = ["-m", "tests.gpu.small_model", "--work", str(work / "small")]
    bits = "a training whole: the same bits twice, and after SIGTERM and resume"
    demo = ["-m", "eve_ds.demo", "--out", str(work / "demo")]
    return [
        Section("ceilings", "products and copies at this device's best", ["-m", "tests.gpu.ceilings"], 60),
        Section("triton", "our Triton kernels beside torch's own, 1.2 x or go", ["-m", "tests.gpu.triton_rivals"], 150),
        Section("varlen", "attention without padding, 1.1 x or go", ["-m", "tests.gpu.varlen_rivals"], 60),
        _bench("moe", "experts beside einsum's and DeepSpeed's", 90, "moe", *layer, *where, *tokens),
        _bench("step", "forward and backward, plain and compiled", 240, "step", *step),
        Section("loop", "the real loop over JPEGs; memory beside the forecast", loop, 400),
        _pytest("same-bits", bits, 150, "tests/gpu/test_same_bits.py"),
        Section("small", "the demo's pre-training: its start, its steps, CUDA graphs", small, 240),
        _bench("attention-speed", "attention beside torch's own", 60, "attention", *heads, *where),
        _bench("loader", "the loader with 14 processes", 90, "loader", *loader, "--work", str(work / "loader")),
        Section("demo", "what make demo runs", demo, 400, least=180, on_cpu=False),
    ]


def _bench(name: str, about: str, limit: float, *arguments: str) -> Section:
    return Section(name, about, ["-m", "tests.gpu.bench_figures", *arguments], limit)
