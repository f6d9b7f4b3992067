"""SBU, CC3M and CC12M in the layouts in which people have them."""

import base64
import json
import pickle
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preprocessing.formats.caption_files import ImageFinder, LineRows, read_captions
from preprocessing.images.exclusion import ImageList
from preprocessing.shards.schema import read_manifest
from preprocessing.sources.split_names import RecordSplits
from preprocessing.text.cleaning import TextCleaning
from tests.unit.preprocessing.helpers import convert, image_of, rows_of, write_json

CAPTIONS = ["a very typical bus station", 'sign that says "stop", café', "interior design of a modern room"]
URLS = [f"http://static.flickr.com/2723/43850{n}_b0f.jpg?v={n}" for n in range(3)]
IDS = ["set-0", "set-1", "set-2"]


def check(folder: Path, captions: list[str] = CAPTIONS, ids: list[str] = IDS) -> None:
    rows = rows_of(folder / "out/train")
    assert [row["caption"] for row in rows] == [[caption] for caption in captions]
    assert [row["image_id"] for row in rows] == ids
    assert [row["image"] for row in rows] == [image_of(int(name.split("-")[1])) for name in ids]


def words(command: str, folder: Path, *more: object, images: bool = True) -> list[object]:
    where = ["--images", folder] if images else []
    return [command, *where, *more, "--split", "train", "--out", folder / "out"]


def put(folder: Path, name: str, number: int) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(image_of(number))


def test_cc3m_tsv_with_images_called_after_row_and_address(tmp_path: Path) -> None:
    """igorbrigadir/DownloadConceptualCaptions: training/ROW_CRC32(URL), no ending."""
    lines = [f"{caption}\t{url}\n" for caption, url in zip(CAPTIONS, URLS, strict=True)]
    (tmp_path / "set.tsv").write_text("".join(lines))
    for number, url in enumerate(URLS):
        put(tmp_path, f"training/{number}_{zlib.crc32(url.encode())}", number)
    template = ("--image-name", "training/{row}_{crc32}")
    convert(*words("cc3m", tmp_path, "--annotations", tmp_path / "set.tsv", *template))
    check(tmp_path)


def test_cc12m_tsv_has_the_address_first_and_lost_images_are_counted(
    tmp_path: Path, refuse: Callable[..., str]
) -> None:
    lines = [f"{url}\t{caption}\r\n" for caption, url in zip(CAPTIONS, URLS, strict=True)]
    (tmp_path / "set.tsv").write_text("".join(lines))
    for number in (0, 2):
        put(tmp_path, f"0000/{number:07d}.webp", number)
    command = words("cc12m", tmp_path, "--annotations", tmp_path / "set.tsv", "--image-name", "0000/{row:07d}")
    assert "more than --max-dropped 0.01 of 3 rows" in refuse(*command)
    convert(*command, "--max-dropped", 0.5)
    check(tmp_path, [CAPTIONS[0], CAPTIONS[2]], ["set-0", "set-2"])
    assert read_manifest(tmp_path / "out/train")["dropped"] == {"image is missing": 1}


def test_tsv_with_a_header_as_pandas_writes_it(tmp_path: Path) -> None:
    """open_clip's Train_GCC-training_output.csv: title and filepath, quoted where a caption holds a quote."""
    quoted = [CAPTIONS[0], '"sign that says ""stop"", café"', CAPTIONS[2]]
    lines = ["title\tfilepath\n", *(f"{caption}\timg/{number}\n" for number, caption in enumerate(quoted))]
    (tmp_path / "set.csv").write_text("".join(lines))
    for number in range(3):
        put(tmp_path, f"img/{number}", number)
    convert(*words("cc3m", tmp_path, "--annotations", tmp_path / "set.csv"))
    check(tmp_path)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("set.jsonl", [{"image": f"img/{n}.jpg", "caption": CAPTIONS[n]} for n in range(3)]),
        ("set.json", [{"image": f"img/{n}.jpg", "caption": CAPTIONS[n]} for n in range(3)]),  # ALBEF's cc3m_train.json
        ("set.json", [[f"img/{n}.jpg", CAPTIONS[n]] for n in range(3)]),  # ViLT's train_annot.json
    ],
)
def test_json_lists_and_lines_that_name_files(tmp_path: Path, name: str, entries: list[Any]) -> None:
    lines = "\n".join(map(json.dumps, entries)) if name.endswith("jsonl") else json.dumps(entries)
    (tmp_path / name).write_text(lines)
    for number in range(3):
        put(tmp_path, f"img/{number}.jpg", number)
    convert(*words("cc3m", tmp_path, "--annotations", tmp_path / name))
    check(tmp_path)


@pytest.mark.parametrize("escaped", [False, True])
def test_eves_json_lines_with_base64(tmp_path: Path, escaped: bool) -> None:
    """What EVE's data_utils/dataset_cc3m.py reads: {"binary", "desc", "url"}; the files have no ending."""
    lines = []
    for number in range(3):
        text = base64.b64encode(image_of(number)).decode()
        record = {"url": URLS[number], "binary": text, "desc": CAPTIONS[number], "size": {"w": 40}}
        line = json.dumps(record, ensure_ascii=False)
        lines.append(line.replace("/", "\\/") if escaped else line)
    (tmp_path / "set").write_text("\n\n".join(lines), encoding="utf-8")
    convert(*words("cc3m", tmp_path, "--annotations", tmp_path / "set", images=False))
    check(tmp_path)


def test_tsv_with_base64_in_named_columns(tmp_path: Path) -> None:
    texts = [base64.urlsafe_b64encode(image_of(number)).decode() for number in range(3)]
    lines = [f"{10 + n}\t{CAPTIONS[n]}\t{texts[n]}\n" for n in range(3)]
    (tmp_path / "set.tsv").write_text("".join(lines))
    command = words("cc12m", tmp_path, "--annotations", tmp_path / "set.tsv", images=False)
    convert(*command, "--columns", "-", "caption", "base64")
    check(tmp_path)


@pytest.mark.parametrize("layout", ["json", "text"])
def test_sbu_by_the_names_in_its_addresses(tmp_path: Path, layout: str) -> None:
    if layout == "json":  # sbu-captions-all.json
        content = {"image_urls": URLS, "user_ids": ["a"] * 3, "captions": CAPTIONS}
        files = [write_json(tmp_path / "set.json", content)]
    else:
        files = [tmp_path / "set.urls.txt", tmp_path / "captions.txt"]
        for file, lines in zip(files, (URLS, CAPTIONS), strict=True):
            file.write_text("".join(f"{line}\n" for line in lines))
    for number in range(3):
        put(tmp_path, f"43850{number}_b0f.jpg", number)
    (tmp_path / "test.txt").write_text("438501_b0f.jpg\n")
    command = words("sbu", tmp_path, "--annotations", *files)
    convert(*command)
    check(tmp_path)
    convert(*command, "--overwrite", "--exclude", tmp_path / "test.txt", "--text-cleaning", "eve")
    check(tmp_path, [CAPTIONS[0], CAPTIONS[2]], ["set-0", "set-2"])


def test_empty_captions_are_left_out_and_rows_keep_their_numbers(tmp_path: Path) -> None:
    lines = [json.dumps({"image": f"{n}.jpg", "caption": text}) for n, text in enumerate(["a", " ", "c"])]
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    for number in range(3):
        put(tmp_path, f"{number}.jpg", number)
    convert(*words("cc3m", tmp_path, "--annotations", tmp_path / "set.jsonl"))
    check(tmp_path, ["a", "c"], ["set-0", "set-2"])
    manifest = read_manifest(tmp_path / "out/train")
    assert manifest["dropped"] == {"caption is empty": 1} and manifest["source"] == {"captions": 3}


def test_the_index_of_lines_takes_20_bytes_a_line_and_no_more_while_it_is_made(tmp_path: Path) -> None:
    count = 20_000
    lines = "".join(f"a\t{number}.jpg\n" for number in range(count))
    for name in ("a.tsv", "b.tsv"):
        (tmp_path / name).write_text("caption\tfile\n" + lines.replace("a", name[0]))
    files = [f"{tmp_path}/a.tsv", f"{tmp_path}/b.tsv"]
    tracemalloc.start()
    try:
        rows = read_captions(
            files, None, ImageFinder("/images", None), TextCleaning(), ImageList([]), RecordSplits("train")
        ).rows
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == 2 * count and rows[count + 7].columns["image_id"] == "b-7"
    assert kept < 24 * 2 * count and peak < 24 * 2 * count + 1_400_000  # a buffer of 1 MiB


def test_rows_are_read_again_by_place(tmp_path: Path) -> None:
    for file in range(2):
        lines = [json.dumps({"image": f"{n}.jpg", "caption": f"{file} {n}"}) for n in range(5)]
        (tmp_path / f"part{file}.jsonl").write_text("\n".join(lines))
    files = [f"{tmp_path}/part{file}.jsonl" for file in range(2)]
    rows = read_captions(
        files, None, ImageFinder("/images", None), TextCleaning(), ImageList([]), RecordSplits("train")
    ).rows
    assert isinstance(rows, LineRows) and len(rows) == 10
    assert [row.columns["caption"] for row in rows] == [[f"{file} {n}"] for file in range(2) for n in range(5)]
    copy = pickle.loads(pickle.dumps(rows))  # noqa: S301  # our own bytes
    assert copy[7] == rows[-3] == list(rows)[7] and copy[7].columns["image_id"] == "part1-2"
    assert rows[3:6] == [rows[3], rows[4], rows[5]]
    with pytest.raises(IndexError):
        rows[10]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    lines = [f"{caption}\t{url}\n" for caption, url in zip(CAPTIONS, URLS, strict=True)]
    for number, url in enumerate(URLS):
        put(tmp_path, f"training/{number}_{zlib.crc32(url.encode())}", number)
    for head in ("", "caption\turl\n"):
        (tmp_path / "set.tsv").write_text("\ufeff" + head + "".join(lines))
        template = ("--image-name", "training/{row}_{crc32}", "--overwrite")
        convert(*words("cc3m", tmp_path, "--annotations", tmp_path / "set.tsv", *template))
        check(tmp_path)


def test_captions_that_are_null_or_cut_in_an_emoji(tmp_path: Path, refuse: Callable[..., str]) -> None:
    captions = ['"cut \\ud83d"', "null", '"whole"']
    for number in range(3):
        put(tmp_path, f"{number}.jpg", number)
    write = (tmp_path / "set.jsonl").write_text
    write("".join(f'{{"caption": {caption}, "image": "{i}.jpg"}}\n' for i, caption in enumerate(captions)))
    command = words("cc12m", tmp_path, "--annotations", tmp_path / "set.jsonl")
    convert(*command)
    assert [row["caption"] for row in rows_of(tmp_path / "out/train")] == [["cut \ufffd"], ["whole"]]
    assert read_manifest(tmp_path / "out/train")["dropped"] == {"caption is empty": 1}
    write('{"caption": 5, "image": "0.jpg"}\n')
    assert "set.jsonl: line 1: its caption is 5, not text" in refuse(*command, "--overwrite")
    (tmp_path / "0.jpg").write_bytes(b"x")
    write('{"caption": "a", "title": 5, "image": "0.jpg"}\n')
    for out in ("out", "other"):
        message = refuse(*command[:-1], tmp_path / out, "--overwrite", "--max-dropped", 1)
        assert "no row is left of 1: 1 times, image " in message
        assert not (tmp_path / f"{out}/.train.work").exists()
    put(tmp_path, "0.jpg", 0)  # and what has been mended is found
    convert(*command, "--overwrite", "--max-dropped", 1)
    check(tmp_path, ["a"], ["set-0"])


@pytest.mark.parametrize(
    "entries",
    [
        [["0.jpg", None], ["1.jpg", "b"]],
        [{"image": "0.jpg", "caption": None, "text": None}, {"image": "1.jpg", "caption": None, "text": "b"}],
    ],
)
def test_null_captions_in_lists(tmp_path: Path, entries: list[Any]) -> None:
    for number in range(2):
        put(tmp_path, f"{number}.jpg", number)
    convert(*words("cc3m", tmp_path, "--annotations", write_json(tmp_path / "set.json", entries)))
    check(tmp_path, ["b"], ["set-1"])
    assert read_manifest(tmp_path / "out/train")["dropped"] == {"caption is empty": 1}


def test_names_do_not_lead_out_of_the_images(tmp_path: Path) -> None:
    """An address's name may be a path too, once it is unquoted; links in the folder may lead anywhere."""
    images = tmp_path / "images"
    put(images, "0.jpg", 0)
    put(tmp_path, "secret.jpg", 1)
    put(tmp_path, "linked/2.jpg", 2)
    (images / "link").symlink_to(tmp_path / "linked")
    names = ["0.jpg", "../secret.jpg", f"{tmp_path}/secret.jpg", "link/2.jpg", f"{images}/a/../0.jpg"]
    records = [{"caption": "a", "image": name} for name in names]
    records.append({"caption": "a", "url": "http://a/..%2Fsecret.jpg"})
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, records)))
    command = ["sbu", "--images", images, "--annotations", tmp_path / "set.jsonl", "--split", "train"]
    convert(*command, "--out", tmp_path / "out", "--max-dropped", 0.5)
    assert [row["image"] for row in rows_of(tmp_path / "out/train")] == [
        image_of(0),
        image_of(2),
        image_of(0),
    ]
    manifest = read_manifest(tmp_path / "out/train")
    assert manifest["dropped"] == {"image path leads out of the folder of images": 3}


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        ("a\tb\n", [], "set.x: line 1: has 2 tab-separated columns without known names"),
        ("cap\thttp://a/b\nc\n", ["--image-name", "{row}"], "set.x: line 2: has 1 tab-separated columns, not 2"),
        ("cap\thttp://a/b\n", [], "line 1: names no image file; say with --image-name"),
        ("cap\thttp://a/b\n", ["--image-name", "{name}"], "--image-name {name}: must use the fields"),
        ("cap\thttp://a/b\n", ["--image-name", "{row"], "--image-name {row: must use"),
        ('{"caption": "a", "image": "b"}\n{"caption": \n', [], "line 2: invalid JSON"),
        ('{"image": "b"}\n', [], "line 1: has no field of caption"),
        ('{"caption": ["a", 5], "image": "b"}\n', [], "line 1: its caption is 5, not text"),
        ('[{"caption": 5, "image": "b"}]', [], "entry 0: its caption is 5, not text"),
        ('{"image_urls": ["http://a/b"], "captions": [5]}', [], "entry 0: its caption is 5, not text"),
        ('{"a": ' + "[" * 100_000, [], "line 1: invalid JSON (nested too deep"),
        ('{"caption": "a"}\n', [], "line 1: names neither an image file nor an address"),
        ('[{"image": "b"}]', [], "entry 0: has no field of caption"),
        ("\x1f\x8b\x08", [], "set.x: line 1: the file is cut"),
        ("", [], "set.x: is empty"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, refuse: Callable[..., str], content: str, more: list[object], said: str
) -> None:
    (tmp_path / "set.x").write_text(content, encoding="latin-1")
    assert said in refuse(*words("cc3m", tmp_path, "--annotations", tmp_path / "set.x", *more))


def test_options_that_are_missing(tmp_path: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / "set.tsv").write_text("cap\thttp://a/b\n")
    assert "--annotations or --images" in refuse(*words("cc3m", tmp_path, images=False))
    assert "with --images" in refuse(*words("cc3m", tmp_path, "--annotations", tmp_path / "set.tsv", images=False))
    assert "cannot be read" in refuse(*words("cc3m", tmp_path, "--annotations", tmp_path / "none.tsv"))
    twice = ["--annotations", tmp_path / "other.tsv", tmp_path / "set.tsv", tmp_path / "a/set.tsv"]
    assert "two files are called set" in refuse(*words("cc3m", tmp_path, *twice))
    for name in ("other.tsv", "set.tsv"):
        (tmp_path / name).write_text("cap\thttp://a/b\n")
    assert "other.tsv and " in (told := refuse(*words("cc3m", tmp_path, *twice[:3])))
    assert "set.tsv: are one file under two names; give it once" in told


THREE = {"caption": "THE CAPTION", "title": "the page title", "text": None, "path": "0.jpg", "image": "1.jpg"}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("form", ["list", "lines", "tsv", "columns"])
def test_of_several_names_for_one_thing_the_first_role_counts(tmp_path: Path, form: str, backwards: bool) -> None:
    record = dict(sorted(THREE.items(), reverse=backwards))
    cells = "\t".join(str(value) for value in record.values())
    content = {
        "list": json.dumps([record]),
        "lines": json.dumps(record),
        "tsv": "\t".join(record) + f"\n{cells}\n",
        "columns": f"{cells}\n",
    }
    (tmp_path / "set.x").write_text(content[form])
    for number in range(2):
        put(tmp_path, f"{number}.jpg", number)
    more = ("--columns", *record) if form == "columns" else ()
    convert(*words("cc3m", tmp_path, "--annotations", tmp_path / "set.x", *more))
    check(tmp_path, ["THE CAPTION"], ["set-0"])


@pytest.mark.parametrize("record", [{"caption": [5], "title": "b"}, {"title": "b", "caption": 5}])
def test_a_caption_that_is_no_text_is_not_replaced_by_a_title(
    tmp_path: Path, refuse: Callable[..., str], record: dict[str, Any]
) -> None:
    for content in ([record | {"image": "0.jpg"}], record | {"image": "0.jpg"}):
        write_json(tmp_path / "set.x", content)
        assert "its caption is 5, not text" in refuse(*words("cc3m", tmp_path, "--annotations", tmp_path / "set.x"))


def test_columns_of_one_name_are_refused(tmp_path: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / "set.tsv").write_text("caption\tcaption\tfile\na\tb\t0.jpg\n")
    command = words("cc3m", tmp_path, "--annotations", tmp_path / "set.tsv")
    assert "set.tsv: line 1: two columns are called caption" in refuse(*command)
    assert "two columns are called file" in refuse(*command, "--columns", "caption", "file", "file")


def inline(number: int) -> str:
    return base64.b64encode(image_of(number)).decode()


@pytest.mark.parametrize(
    "line",
    [
        f'{{"desc": "a", "thumb": {{"binary": "{inline(1)}"}}, "binary": "{inline(0)}"}}',
        f'{{"desc": "a", "binary": "{inline(1)}", "binary": "{inline(0)}"}}',
        f'{{"desc": "a", "binary" : "{inline(0)}", "thumb": {{"binary": "{inline(1)}"}}}}',
        f'{{"desc": "a", "thumb": {{"image": "{inline(1)}"}}, "image": "{inline(0)}", "url": "http://a/b"}}',
        f'{{"desc": "a", "thumb": {{"binary": "{inline(1)}"}}, "binary": "{inline(0)}"}}'.replace("/", "\\/"),
        f'{{"desc": "a", "thumb": {{"binary": "{inline(1)}"}}, "binary": "{inline(0)}"}}'.replace("B", "\\u0042"),
        f'{{"desc": "a", "image": "{inline(1)}", "binary": "{inline(0)}"}}',
    ],
)
def test_the_place_of_base64_is_that_of_the_field_itself(tmp_path: Path, line: str) -> None:
    """A nested object may have a field of that name, and a name may stand twice: then JSON takes the last."""
    (tmp_path / "set.jsonl").write_text(line)
    convert(*words("cc3m", tmp_path, "--annotations", tmp_path / "set.jsonl", images=False))
    check(tmp_path, ["a"], ["set-0"])


def test_base64_whose_place_is_not_found_is_refused(tmp_path: Path, refuse: Callable[..., str]) -> None:
    line = f'{{"desc": "a", "thumb": {{"binary": "{inline(1)}"}}, "bin\\u0061ry": "{inline(0)}"}}'
    (tmp_path / "set.jsonl").write_text(line)
    message = refuse(*words("cc3m", tmp_path, "--annotations", tmp_path / "set.jsonl", images=False))
    assert "set.jsonl: line 1: field 'binary' is written in an odd way" in message


@pytest.mark.parametrize("length", [252, 300])  # with ".jpg", and without an ending, longer than a file's name may be
def test_names_that_no_file_can_have_are_missing(tmp_path: Path, length: int) -> None:
    urls = [*URLS, f"http://a/{'n' * length}"]
    (tmp_path / "set.tsv").write_text("".join(f"{url}\tcaption\n" for url in urls))
    for number in range(3):
        put(tmp_path, f"43850{number}_b0f.jpg", number)
    convert(*words("sbu", tmp_path, "--annotations", tmp_path / "set.tsv", "--max-dropped", 0.5))
    check(tmp_path, ["caption"] * 3)
    assert read_manifest(tmp_path / "out/train")["dropped"] == {"image is missing": 1}
