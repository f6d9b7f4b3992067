"""`bench loader` at tiny sizes, in real processes: a whole run, and what is missing is named."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eve_ds.bench import __main__ as bench
from eve_ds.bench import loader
from eve_ds.bench.loader_process import JobError, JobProcess, Settings


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_whole_run_without_a_bench_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    sizes = ["--images", "16", "--batch_size", "2", "--processes", "1", "--packing_copies", "1", "--shards", "2"]
    rounds = ["--repeats", "2", "--warmup", "0", "--threads", "1"]
    where = ["--work", str(tmp_path / "work"), "--bench_python", str(tmp_path / "none")]
    bench.main(["loader", *sizes, *rounds, *where, "--json", str(file)])
    found = json.loads(file.read_text(encoding="utf-8"))
    rates = found["images_per_second"]
    assert list(rates) == ["ours", "bare", "webdataset", "streaming", "datasets"]
    assert rates["ours"] > 0 and rates["bare"] > 0
    assert found["ours_over"] == {"bare": pytest.approx(rates["ours"] / rates["bare"])}
    for baseline in loader.BASELINES:
        assert rates[baseline] is None
        assert "make bench-env" in found["not_measured"][baseline]
    assert len(found["all_images_per_second"]["ours"]) == 2
    packed, read = found["packing_images_per_second"], found["reading_and_hashing_images_per_second"]
    assert found["packing_share"] == pytest.approx(packed / read)
    assert found["writing_images_per_second"] > 0
    assert 0 < found["open_seconds"] <= found["open_every_shard_seconds"]
    assert (found["open_shards"], found["open_rows"]) == (2, 16_000)
    table = capsys.readouterr().out
    assert "streaming: images/s" in table and "not measured" in table


def test_a_baseline_that_is_not_installed_is_named(tmp_path: Path) -> None:
    settings = Settings(str(tmp_path), str(tmp_path / "images"), images=16, batch_size=2, processes=1)
    process = JobProcess("absent", f"{loader._BASELINES_MODULE}:WebDataset", settings, _bare_python(settings), 60)
    with pytest.raises(JobError, match=r"webdataset.*absent\.log"):
        process.start()
    process.close()
    assert "Traceback" in process.log.read_text(encoding="utf-8")


def _bare_python(settings: Settings) -> Path:
    """An interpreter of an environment where every baseline fails to import."""
    blocked = Path(settings.work) / "blocked"
    for name in loader.BASELINES:
        (blocked / name).mkdir(parents=True, exist_ok=True)
        (blocked / name / "__init__.py").write_text(f"raise ImportError('{name} is broken')")
    script = Path(settings.work) / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{blocked}:$PYTHONPATH" exec "{sys.executable}" "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script
