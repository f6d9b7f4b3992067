"""The documents: links lead somewhere, files and modules that they name exist, and README stays short."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[!.]*/README.md")})
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names what was, too
README_LINES = 150

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"(?:docs|ds_configs|evaluation|eve_ds|launch|preprocessing|tests)/[\w./-]*")
_MODULE = re.compile(r"(?:python3? -m|--module|srun python -m) ((?:eve_ds|evaluation|preprocessing|tests|docs)[\w.]*)")
_FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", _FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in _LINK.findall(_FENCE.sub("", text_of(page))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(target)
    return broken


def missing_paths(text: str) -> list[str]:
    """What stands in backticks or in a command and looks like a path of the repository, but is none."""
    code = [*_CODE.findall(_FENCE.sub("", text)), *re.findall(r"^ {4}(.+)$", text, re.MULTILINE)]
    words = [word for part in code for word in part.split()]
    paths = [word for word in words if _PATH.fullmatch(word)]
    return [path for path in paths if not (ROOT / path).exists()]


def missing_modules(text: str) -> list[str]:
    """What `python -m` or a launcher's `--module` is given, of our packages, and cannot be found."""
    names = {name.rstrip(".") for name in _MODULE.findall(text)}
    return sorted(name for name in names if importlib.util.find_spec(name) is None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_modules_exist(page: Path) -> None:
    assert missing_paths(text_of(page)) == []
    assert missing_modules(text_of(page)) == []


def test_what_is_missing_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](gone.md) [b](#no-title) [c](#a-title) [d](https://example.org)\n", encoding="utf-8")
    assert broken_links(page) == ["gone.md", "#no-title"]
    assert missing_paths("`eve_ds/gone.py`, `eve_ds/config.py`, `runs/base`, `tests/unit/`") == ["eve_ds/gone.py"]
    assert missing_paths("    x --config eve_ds/configs/gone.yaml --data.path runs/base\n") == [
        "eve_ds/configs/gone.yaml"
    ]
    assert missing_modules("python -m eve_ds.gone x, `python -m eve_ds.plan`.") == ["eve_ds.gone"]


def test_readme_is_short_and_names_every_page() -> None:
    readme = text_of(ROOT / "README.md")
    assert readme.count("\n") <= README_LINES
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in _LINK.findall(readme)}
    pages = set((ROOT / "docs").glob("*.md"))
    assert sorted(path.name for path in pages - linked) == []
