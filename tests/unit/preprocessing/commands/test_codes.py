"""`codes`: codes from a file become a column of caption shards, and `verify`, its repair and `inspect` know it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocessing.__main__ import main
from preprocessing.shards.reader import code_grid
from preprocessing.shards.schema import CAPTION_SCHEMA, CodeGrid, read_manifest
from preprocessing.shards.writer import ShardWriter, write_manifest
from tests.support.shards import GRID, code_of, make_caption_set, make_code_set, make_vqa_set
from tests.unit.preprocessing.helpers import convert, rows_of

IDS = [f"image-{number}" for number in (*range(10), *range(100_000, 100_004))]
CODES = np.array([code_of(row) for row in range(len(IDS))])
Refuse = Callable[..., str]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten images in two shards of train, and four of val."""
    make_caption_set(tmp_path / "data", rows=10)
    make_caption_set(tmp_path / "data", rows=4, split="val")
    return tmp_path / "data"


def npz(path: Path, ids: Any = IDS, codes: Any = CODES) -> Path:
    np.savez(path, image_id=np.array(ids), codes=codes)
    return path


def parquet(path: Path, ids: Any = IDS, codes: Any = CODES) -> Path:
    lists = codes.tolist() if isinstance(codes, np.ndarray) else codes
    pq.write_table(pa.table({"codes": lists, "other": [0] * len(ids), "image_id": list(ids)}), path)
    return path


def split_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "provenance.json"}


def add(data: Path, codes: Path, out: Path | str, *more: object) -> tuple[object, ...]:
    return ("codes", "--data", data, "--codes", codes, "--vocabulary", 11, "--out", out, *more)


def test_codes_become_a_column_and_all_else_stays(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From either kind of file, in any order, the same bytes."""
    order = np.random.default_rng(0).permutation(len(IDS))
    mixed = [IDS[place] for place in order]
    convert(
        *add(
            data,
            npz(tmp_path / "c.npz", [*mixed, "gone"], np.append(CODES[order], CODES[:1], 0).reshape(-1, 4, 4)),
            tmp_path / "one",
        )
    )
    said = capsys.readouterr().out
    assert f"{tmp_path}/one/train: 10 images with 4 x 4 codes below 11" in said and "codes of 1 other images" in said
    convert(*add(data, parquet(tmp_path / "c.parquet"), tmp_path / "two"))
    assert "other images" not in capsys.readouterr().out
    for split, first in (("train", 0), ("val", 10)):
        assert split_bytes(tmp_path / "one" / split) == split_bytes(tmp_path / "two" / split)
        before, after = rows_of(data / split), rows_of(tmp_path / "one" / split)
        assert [row.pop("codes") for row in after] == CODES[first : first + len(after)].tolist() and before == after
        old, new = (read_manifest(root / split) for root in (data, tmp_path / "one"))
        for shard in (*old["shards"], *new["shards"]):
            del shard["bytes"], shard["sha256"]
        assert old == new
        path = tmp_path / "one" / split / "shard-00000.arrow"
        with pa.ipc.open_file(path) as reader:
            assert reader.schema.field("codes").type == pa.list_(pa.uint16())
            assert reader.schema.field("codes").metadata == {b"side": b"4", b"vocabulary": b"11"}
        provenance = json.loads((tmp_path / "one" / split / "provenance.json").read_text())
        assert [Path(one["file"]).name for one in provenance["inputs"]] == ["c.npz", "manifest.json"]
    convert("verify", tmp_path / "one")
    convert("inspect", tmp_path / "one")
    said = capsys.readouterr().out
    assert (
        "and codes list<item: uint16>: 4 x 4 codes below 11" in said
        and '"codes": "16 codes, 11 of them different"' in said
    )
    convert("inspect", data)
    assert "and codes" not in capsys.readouterr().out


def test_whole_numbers_as_ids_and_a_large_vocabulary(tmp_path: Path) -> None:
    folder = make_caption_set(tmp_path / "data", rows=3)
    rows = rows_of(folder)
    with_numbers(folder, rows)
    codes = np.array([[70_000 * row + place for place in range(4)] for row in range(3)])
    for name, write in (("c.npz", npz), ("c.parquet", parquet)):
        out = tmp_path / f"out-{name}"
        convert(
            "codes",
            "--data",
            folder,
            "--codes",
            write(tmp_path / name, [1, 2, 3], codes),
            "--out",
            out,
            "--vocabulary",
            200_000,
        )
        assert [row["codes"] for row in rows_of(out / "train")] == codes.tolist()
        assert code_grid(out / "train", read_manifest(out / "train")) == CodeGrid(2, 200_000)


def with_numbers(folder: Path, rows: list[dict[str, Any]], grid: CodeGrid | None = None) -> None:
    """Write rows anew, with the ids 1, 2, ..."""
    for path in folder.iterdir():
        path.unlink()
    with ShardWriter(folder, "caption", "train", grid=grid) as writer:
        for number, row in enumerate(rows, 1):
            writer.add(row | {"image_id": str(number)})
        write_manifest(folder, "caption", "train", writer.close(), dropped={}, dropped_items=[], source={})


def test_new_codes_replace_old_ones_and_a_finished_split(data: Path, tmp_path: Path, refuse: Refuse) -> None:
    codes, out = npz(tmp_path / "c.npz"), tmp_path / "out"
    convert(*add(data / "train", codes, out))
    assert not (out / "val").exists()
    assert "holds a finished split already (10 rows, kind caption); give --overwrite" in refuse(*add(data, codes, out))
    convert(*add(out / "train", npz(tmp_path / "d.npz", codes=10 - CODES), tmp_path / "again"))
    assert [row["codes"] for row in rows_of(tmp_path / "again/train")] == (10 - CODES[:10]).tolist()
    convert(*add(data, npz(tmp_path / "d.npz", codes=10 - CODES), out, "--overwrite"))
    assert split_bytes(out / "train") == split_bytes(tmp_path / "again/train") and (out / "val").exists()
    for folder in (data, data / "train"):
        assert f"--out {data}: is where --data lies" in refuse(*add(folder, codes, data, "--overwrite"))


@pytest.mark.parametrize(
    ("ids", "codes", "said"),
    [
        (IDS[:-2], CODES[:-2], "no codes of 2 of the 4 images of DATA/val: image_id image-100002, image-100003; comp"),
        (["x"] * 14, np.zeros((14, 16), int), "image_id x occurs twice; keep one of them"),
        (IDS[:9], CODES[:9], "has no codes of 1 of the 10 images of DATA/train: image_id image-9; compute them"),
        ([f"x{i}" for i in range(14)], CODES, "image_id image-0, image-1, image-2, …; compute"),
        ([*IDS, "image-3"], [*CODES.tolist(), CODES[0].tolist()], "image_id image-3 occurs twice; keep one of them"),
        (IDS, CODES + 1, "image_id image-0 has code 11 at place 7; codes must be from 0 to 10, so raise --vocabulary"),
        (IDS, CODES - 1, "image_id image-0 has code -1 at place 0; codes must be from 0 to 10"),
        (IDS, CODES[:, :15], "holds 14 images with 15 codes each; a grid has side x side of them"),
        (IDS, CODES.astype(float), "not "),
        (np.array(IDS, dtype=bytes), CODES, "image_id "),
    ],
)  # fmt: skip
def test_codes_that_do_not_fit_are_told_before_anything_is_written(
    data: Path, tmp_path: Path, refuse: Refuse, ids: Any, codes: Any, said: str
) -> None:
    for name, write in (("c.npz", npz), ("c.parquet", parquet)):
        error = refuse(*add(data, write(tmp_path / name, ids, codes), tmp_path / "out"))
        assert f"--codes {tmp_path / name}: " in error and said.replace("DATA", str(data)) in error
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"image_id": IDS}, "holds no codes"),
        ({"codes": CODES.tolist()}, "holds no image_id"),
        ({"image_id": [*IDS[:-1], None], "codes": CODES.tolist()}, "image_id holds a null"),
        ({"image_id": IDS, "codes": [*CODES.tolist()[:-1], [1] * 9]}, "has 9 codes, image_id image-0 has 16"),
        ({"image_id": IDS, "codes": [*CODES.tolist()[:-1], None]}, "image_id image-100003 has 0 codes"),
        ({"image_id": IDS, "codes": [*CODES.tolist()[:-1], [None] * 16]}, "codes hold a null"),
    ],
)  # fmt: skip
def test_columns_of_a_parquet_file(data: Path, tmp_path: Path, refuse: Refuse, columns: Any, said: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    assert said in refuse(*add(data, tmp_path / "c.parquet", tmp_path / "out"))


def test_other_mistakes_are_told_in_a_line(data: Path, tmp_path: Path, refuse: Refuse) -> None:
    out, codes = tmp_path / "out", npz(tmp_path / "c.npz")
    assert "c.npy: must end in .npz or .parquet" in refuse(*add(data, tmp_path / "c.npy", out))
    assert "none.npz: no such file; compute the codes first" in refuse(*add(data, tmp_path / "none.npz", out))
    (tmp_path / "bad.npz").write_bytes(b"PK no")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    for name in ("bad.npz", "bad.parquet"):
        assert f"--codes {tmp_path / name}: " in refuse(*add(data, tmp_path / name, out))
    np.save(tmp_path / "array.npz.npy", CODES)
    assert "array.npz: " in refuse(*add(data, (tmp_path / "array.npz.npy").rename(tmp_path / "array.npz"), out))
    np.savez(tmp_path / "half.npz", image_id=np.array(IDS))
    assert "half.npz: holds no codes; see --help" in refuse(*add(data, tmp_path / "half.npz", out))
    assert "not whole numbers [14, side * side]" in refuse(*add(data, npz(tmp_path / "d.npz", codes=CODES[:5]), out))
    empty = npz(tmp_path / "f.npz", codes=CODES[:, :0])
    assert "holds 14 images with 0 codes each" in refuse(*add(data, empty, out))
    oblong = npz(tmp_path / "e.npz", codes=CODES.reshape(-1, 2, 8))
    assert "of shape (14, 2, 8), not whole numbers" in refuse(*add(data, oblong, out))
    assert "--vocabulary 0: must be from 1" in refuse(*add(data, codes, out, "--vocabulary", 0))
    assert "--out s3://bucket/x: must be a local folder" in refuse(*add(data, codes, "s3://bucket/x"))
    make_vqa_set(tmp_path / "vqa", rows=2)
    assert "vqa/train: holds vqa data; only caption shards have codes" in refuse(*add(tmp_path / "vqa", codes, out))
    make_vqa_set(out, rows=2, split="val")
    assert "holds a vqa data set (val), not caption" in refuse(*add(data / "train", codes, out))


def test_damaged_shards_are_not_copied(data: Path, tmp_path: Path, refuse: Refuse) -> None:
    codes, shard = npz(tmp_path / "c.npz"), data / "train/shard-00001.arrow"
    content = shard.read_bytes()
    image = rows_of(data / "train")[9]["image"]
    shard.write_bytes(content.replace(image, image[:-1] + b"!"))
    assert "shard-00001.arrow: has changed since it was made; see `python -m pre" in refuse(
        *add(data, codes, tmp_path / "out")
    )
    assert not (tmp_path / "out/train").exists()
    shard.write_bytes(content[:-100])
    assert "shard-00001.arrow: is no Arrow file" in refuse(*add(data, codes, tmp_path / "out"))
    rows = [row | {"image_id": None} for row in rows_of(data / "val")]
    (data / "val/shard-00000.arrow").unlink()
    with ShardWriter(data / "val", "caption", "val") as writer:
        for row in rows:
            writer.add(row)
        write_manifest(data / "val", "caption", "val", writer.close(), dropped={})
    assert "shard-00000.arrow rows 0 to 3: an image_id is null" in refuse(*add(data / "val", codes, tmp_path / "out"))


def test_verify_finds_codes_at_fault_and_repair_keeps_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {1: [0] * 15, 2: [11] * 16, 3: None, 4: [*[0] * 15, None]}
    folder = make_code_set(tmp_path, rows=6, changed=wrong)
    assert main(["verify", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    for row, fault in (
        (1, "codes has 15 entries, the grid 4 x 4"),
        (2, "codes holds 11, which is not from 0 to 10"),
        (3, "column codes is null"),
        (4, "codes is null, or holds a null"),
    ):
        assert f"shard-00000.arrow row {row}: {fault}" in said
    assert said.count("\n") == 4
    assert main(["verify", str(tmp_path), "--repair"]) == 0
    assert [row["codes"] for row in rows_of(folder)] == [code_of(0), code_of(5)]
    assert code_grid(folder, read_manifest(folder)) == GRID
    (folder / "manifest.json").unlink()  # found out again, with the codes
    assert main(["verify", str(tmp_path), "--repair"]) == 0
    assert len(rows_of(folder)) == 2


def test_verify_finds_shards_of_another_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, grid in (("more", CodeGrid(4, 12)), ("none", None)):
        folder = make_code_set(tmp_path / name, rows=10)
        with ShardWriter(folder, "caption", "train", grid=grid) as writer:
            for row in rows_of(folder)[8:]:
                writer.add(row)
            (second,) = writer.close()
        (folder / "shard-00000.arrow").rename(folder / "shard-00001.arrow")
        make_code_set(tmp_path / "first", rows=8)
        (tmp_path / "first/train/shard-00000.arrow").rename(folder / "shard-00000.arrow")
        first = read_manifest(tmp_path / "first/train")["shards"][0]
        shards = [first, second | {"file": "shard-00001.arrow"}]
        write_manifest(folder, "caption", "train", shards, dropped={}, dropped_items=[], source={})
        assert main(["verify", str(tmp_path / name)]) == 1
        own = grid or "no codes"
        assert f"shard-00001.arrow: has {own}, shard-00000.arrow has {GRID}; add them again" in capsys.readouterr().err


def test_two_columns_of_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_code_set(tmp_path, rows=2) / "shard-00000.arrow"
    table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
    table = table.append_column(GRID.field, table["codes"])
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    assert main(["verify", str(tmp_path)]) == 1
    assert "shard-00000.arrow: there are several columns 'codes'; add its codes again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "said"),
    [
        (GRID.field.remove_metadata(), "the metadata of column 'codes' tell no side and vocabulary"),
        (GRID.field.with_metadata({"side": "4", "vocabulary": "many"}), "the metadata of column"),
        (GRID.field.with_metadata({"side": "0", "vocabulary": "5"}), "the metadata of column"),
        (GRID.field.with_type(pa.list_(pa.int64())), "column 'codes' is list<item: int64>, not a list of"),
        (GRID.field.with_type(pa.list_(pa.int32())), ""),
    ],
)  # fmt: skip
def test_a_column_of_another_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], field: pa.Field, said: str
) -> None:
    folder = make_code_set(tmp_path, rows=2)
    table = pa.Table.from_pylist(rows_of(folder), schema=CAPTION_SCHEMA.append(field))
    path = folder / "shard-00000.arrow"
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    if said:
        assert main(["verify", str(tmp_path)]) == 1
        assert f"shard-00000.arrow: {said}" in capsys.readouterr().err
        return
    (folder / "manifest.json").unlink()
    assert main(["verify", str(tmp_path), "--repair"]) == 0
    assert rows_of(folder)[1]["codes"] == code_of(1)
