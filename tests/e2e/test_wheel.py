"""EVE-DS as a wheel, in an environment of its own and outside of the checkout: files, commands, a run of two ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support.shards import make_caption_set, tiny_tokenizer

SOURCES = ("eve_ds", "preprocessing", "evaluation", "ds_configs", "launch")
FILES = ("pyproject.toml", "README.md", "LICENSE", "requirements.txt")


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves its work beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(repository / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(repository / name, source / name)
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", out, source)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel, and what it needs from this one."""
    home = tmp_path_factory.mktemp("env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    site = next(home.glob("lib/python*/site-packages"))
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip("--python", home / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    return home / "bin"


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run(installed: Path, folder: Path, command: str, *arguments: str) -> str:
    """The output of an installed command, started in ``folder``; nothing in its environment leads to the checkout."""
    hidden = ("PYTHONPATH", "TORCH_EXTENSIONS_DIR", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    kept |= {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [installed / command, *arguments], cwd=folder, env=kept, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{command} {arguments}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_recipes_deepspeed_files_and_the_web_page_are_inside_tests_and_benchmarks_are_not(
    wheel: Path, repository: Path
) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    patterns = ("eve_ds/configs/*.yaml", "ds_configs/*.json", "eve_ds/predict/page/*")
    shipped = [path for pattern in patterns for path in repository.glob(pattern)]
    assert len(shipped) > 20 and {str(path.relative_to(repository)) for path in shipped} <= set(names)
    modules = {str(path.relative_to(repository)) for root in SOURCES[:3] for path in repository.glob(f"{root}/**/*.py")}
    bench = {name for name in modules if name.startswith("eve_ds/bench/")}
    assert bench and modules - bench <= set(names)
    assert not [name for name in names if name.startswith(("tests", "launch", "docs", "build", "eve_ds/bench"))]


def test_recipes_are_found_by_name_outside_of_the_checkout(installed: Path, tmp_path: Path) -> None:
    printed = run(installed, tmp_path, "eve-pretrain", "--config", "tiny_shapes", "--print_config")
    assert "vocab_size: 512" in printed and "mode: separate" in printed
    path = run(installed, tmp_path, "eve-finetune", "--config=eve_ds/configs/vqa.yaml", "--print_config")
    assert "task: vqa" in path
    found = run(installed, tmp_path, "python", "-c", "import eve_ds.recipes as r; print(r.HOME)")
    assert Path(found.strip()).is_relative_to(installed.parent)


@pytest.mark.long
def test_every_command_of_the_package_tells_its_usage(installed: Path, repository: Path, tmp_path: Path) -> None:
    scripts = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["scripts"]
    assert len(scripts) >= 13
    for name in scripts:
        told = run(installed, tmp_path, name, "--help")
        assert "usage" in told.lower() or "python -m eve_ds" in told, name


@pytest.mark.long
def test_two_ranks_train_from_the_installed_package(installed: Path, repository: Path, tmp_path: Path) -> None:
    for rows, split in ((24, "train"), (6, "val")):
        make_caption_set(tmp_path / "captions", rows=rows, split=split)
    tiny_tokenizer(tmp_path / "tokenizer")
    recipe = shutil.copy(repository / "tests" / "e2e" / "tiny.yaml", tmp_path / "mine.yaml")
    options = ["--config", Path(recipe).name, "--data.path", "captions", "--data.tokenizer", "tokenizer"]
    options += ["--deepspeed_config", "zero2", "--output_dir", "run", "--logging.wandb", "false"]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module"]
    told = run(installed, tmp_path, "python", *launcher, "eve_ds.pretrain", *options)
    assert "finished" in told and (tmp_path / "run" / "model" / "model.safetensors").is_file()
    report = run(installed, tmp_path, "eve-report", "--run", "run", "--out", "report.html")
    assert (tmp_path / "report.html").stat().st_size > 1000, report
