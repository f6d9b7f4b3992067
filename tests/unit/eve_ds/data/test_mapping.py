"""A mapped file: what is read is what is there, and no fault of the file ends the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from eve_ds.data.mapping import MappedFile, binary_cell
from eve_ds.data.shards import RowError, Split
from preprocessing.errors import UserError
from tests.support.limits import few_descriptors
from tests.support.ranks import REPOSITORY
from tests.support.shards import image_of, make_caption_set, shard_record, write_manifest


def shard(root: Path, rows: int = 3) -> Path:
    return make_caption_set(root, rows=rows, image_size=8) / "shard-00000.arrow"


def mapped(path: Path) -> MappedFile:
    return MappedFile(path, path.stat().st_size)


def cell(file: MappedFile, row: int, batch: int = 0) -> pa.Buffer:
    """The image of a row, where it lies."""
    view = binary_cell(file.reader.get_batch(batch).column("image"), row)
    assert view is not None
    return view


def test_reads_a_cell_from_its_byte_range_in_the_file(tmp_path: Path) -> None:
    path = shard(tmp_path, rows=5)
    file = mapped(path)
    for row in range(5):
        view = cell(file, row % 3, row // 3)
        place = file.byte_range(view)
        assert place is not None  # not a copy somewhere else in memory
        assert file.read(view) == path.read_bytes()[slice(*place)] == image_of(row, 8)


def test_binary_cells() -> None:
    values = [b"one", None, b"", *(b"%d" % i for i in range(20)), None]
    for kind in (pa.binary(), pa.large_binary()):
        for start in (0, 1, 5, 9):  # slices share the buffers of the whole
            column = pa.array(values, kind)[start:]
            found = [binary_cell(column, index) for index in range(len(column))]
            assert [view if view is None else view.to_pybytes() for view in found] == values[start:]
    assert binary_cell(pa.array([None], pa.binary()), 0) is None


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_batches_are_read_too(tmp_path: Path, compression: str) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    captions = [[f"{i}/{c}" for c in range(1 + i % 2)] for i in range(7)]
    table = pa.table({"image": [image_of(i, 8) for i in range(7)], "caption": captions})
    path = folder / "shard-00000.arrow"
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=3)
    file = mapped(path)
    assert file.byte_range(cell(file, 0)) is None
    split = Split(write_manifest(folder, "caption", "train", [shard_record(path, 7, 10)]))
    split.read_ahead(range(10))  # there is nothing to ask for, and nothing fails
    found = [split.sample(index) for index in range(10)]
    assert [row.item("caption", item) for _, row, item in found] == [text for of_row in captions for text in of_row]
    assert all(row.blob("image") == image_of(number, 8) for number, row, _ in found)


def test_descriptors_are_closed_when_nothing_refers_to_the_file(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    file = mapped(shard(tmp_path))
    view = cell(file, 1)
    assert len(set(os.listdir("/proc/self/fd")) - before) == 2
    assert file.read(view) == image_of(1, 8)
    del file, view
    assert set(os.listdir("/proc/self/fd")) <= before
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    for broken in (empty, Path(__file__)):
        with pytest.raises(UserError, match="not a readable Arrow file"):
            mapped(broken)
    assert set(os.listdir("/proc/self/fd")) <= before


def test_too_few_descriptors_are_reported_as_such(tmp_path: Path) -> None:
    path = shard(tmp_path)
    with few_descriptors(), pytest.raises(UserError, match=r"shard-00000\.arrow: .*raise `ulimit -n`$"):
        mapped(path)


def test_missing_file_or_wrong_size(tmp_path: Path) -> None:
    path = shard(tmp_path)
    file = mapped(path)
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"shard-00000\.arrow: {len(content)} bytes, .* {len(whole)}"):
            file.check()
    other = path.with_name("other")
    other.write_bytes(whole)
    other.replace(path)
    with pytest.raises(UserError, match=r"shard-00000\.arrow: was replaced while it was read"):
        file.check()
    path.unlink()
    with pytest.raises(UserError, match=r"shard-00000\.arrow: No such file"):
        file.check()


# What may end a process by a signal is tried in another one.


def run(script: str, *arguments: object) -> str:
    words = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, (result.returncode, result.stderr)
    return result.stdout


CUT_OFF = """
import os, sys
from eve_ds.data.mapping import binary_cell
from eve_ds.data.shards import Split
from preprocessing.errors import UserError
split = Split(sys.argv[1])
number, row, item = split.sample(split.samples - 1)
path, view = row.path, binary_cell(row.batch.column("image"), row.index)
os.truncate(path, 100)
looks = {
    "pread": lambda: row.file.read(view), "blob": lambda: row.blob("image"),
    "byte_range": lambda: row.byte_range("image"),
    "value": lambda: row.value("image_id"), "item": lambda: row.item("caption", 0),
    "entries": lambda: row.entries("caption"), "row": lambda: split.row(0), "sample": lambda: split.sample(0),
    "ahead": lambda: split.read_ahead([0]),
}
for name, look in looks.items():
    try:
        look()
    except UserError as error:
        print(name, error)
"""


def test_truncation_of_a_mapped_file_is_an_error_and_no_bus_error(tmp_path: Path) -> None:
    path = make_caption_set(tmp_path, rows=200, image_size=32, shard_rows=200) / "shard-00000.arrow"
    assert path.stat().st_size > 20 * os.sysconf("SC_PAGESIZE")  # a page that the file ends in can be read
    lines = run(CUT_OFF, path.parent).splitlines()
    assert [line.split()[0] for line in lines] == (
        ["pread", "blob", "byte_range", "value", "item", "entries", "row", "sample", "ahead"]
    )
    assert "shard-00000.arrow: ends before byte" in lines[0]
    assert all("shard-00000.arrow: 100 bytes" in line for line in lines[1:])


WRONG_OFFSETS = """
import sys
from eve_ds.data.shards import Split
from preprocessing.errors import UserError
for folder in sys.argv[1:]:
    split = Split(folder)
    try:
        for index in range(split.samples):
            _, row, item = split.sample(index)
            row.item("caption", item), row.value("image_id"), row.blob("image")
        print("read")
    except UserError as error:
        print(error)
"""


def test_invalid_offsets_are_an_error_and_no_crash(tmp_path: Path) -> None:
    """Arrow itself follows them: by a length error, a segmentation fault, or into another cell."""
    folders = []
    for column, place, wrong in [
        ("image", 1, -(2**31)),
        ("image", 1, 2**31 - 1),
        ("image_id", 1, -5),
        ("image_id", 2, 2**30),
        ("caption", 1, 2**30),
        ("caption", 2, 0),
    ]:
        path = shard(tmp_path / f"{len(folders)}")
        file = mapped(path)
        offsets = file.reader.get_batch(0).column(column).buffers()[1]
        start, _ = file.byte_range(offsets) or (0, 0)
        content = bytearray(path.read_bytes())
        content[start + 4 * place : start + 4 * place + 4] = wrong.to_bytes(4, "little", signed=True)
        path.write_bytes(content)
        folders.append(path.parent)
    lines = run(WRONG_OFFSETS, *folders).splitlines()
    assert len(lines) == len(folders)
    assert all("shard-00000.arrow: is not a readable Arrow file" in line for line in lines), lines


def test_offsets_that_become_invalid_are_a_row_error(tmp_path: Path) -> None:
    path = shard(tmp_path)
    split = Split(path.parent)
    row = split.row(1)
    assert row.blob("image") == image_of(1, 8)
    start, _ = row.file.byte_range(row.batch.column("image").buffers()[1]) or (0, 0)
    for wrong in (-1, 2**31 - 1):
        with open(path, "r+b") as file:  # in place: the map shows it
            file.seek(start + 8)
            file.write(wrong.to_bytes(4, "little", signed=True))
        with pytest.raises(RowError, match=r"shard-00000\.arrow: row 1: column 'image'"):
            row.blob("image")
