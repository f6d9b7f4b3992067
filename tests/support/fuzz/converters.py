"""Fuzz targets of ``python -m preprocessing``: every annotation form, tars, Parquet; and the tools over shards."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.__main__ import main
from preprocessing.shards.reader import read_rows
from preprocessing.shards.schema import IMAGE_COLUMNS, SAMPLE_COLUMN, read_manifest
from tests.support.fuzz.runner import Target, Wrong
from tests.support.fuzz.seeds import dumped, lines, tree_of
from tests.support.shards import image_of, make_caption_set, make_nlvr_set, make_vqa_set

IMAGES = {f"images/{n}.jpg": image_of(n, 24, "JPEG") for n in range(3)}
COCO_IMAGES = {f"images/COCO_train2014_{n:012d}.jpg": image_of(n, 24, "JPEG") for n in range(3)}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "images",
            "filename": f"{n}.jpg",
            "split": ("train", "restval", "train")[n],
            "cocoid": n,
            "imgid": n,
            "sentids": [2 * n, 2 * n + 1],
            "sentences": [
                {"raw": f"caption {i} of {n}", "tokens": ["caption", str(i), "of", str(n)], "imgid": n, "sentid": 2 * n}
                for i in range(2)
            ],
        }
        for n in range(3)
    ],
}
COCO = {
    "info": {"year": 2014},
    "images": [{"id": n, "file_name": f"{n}.jpg", "width": 24, "height": 24} for n in range(3)],
    "annotations": [{"id": 10 + i, "image_id": i % 3, "caption": f"image {i} of a thing"} for i in range(6)],
}
REGIONS = [
    {"id": n, "regions": [{"region_id": 10 * n + i, "image_id": n, "phrase": f"thing {i}"} for i in range(2)]}
    for n in range(3)
]
VG_IMAGES = [{"image_id": n, "url": f"https://a/images/{n}.jpg", "coco_id": None, "width": 24} for n in range(3)]
VG_QUESTIONS = [
    {
        "id": n,
        "qas": [{"qa_id": 10 * n + i, "image_id": n, "question": f"what {i}?", "answer": "A dog."} for i in (0, 1)],
    }
    for n in range(3)
]
QUESTIONS = {
    "questions": [{"image_id": i % 3, "question": f"is it {i}?", "question_id": 100 + i} for i in range(6)],
    "data_subtype": "train2014",
}
PEOPLE = [
    {"answer": word, "answer_confidence": "yes", "answer_id": i} for i, word in enumerate(["yes"] * 7 + ["no"] * 3)
]
ANSWERS = {
    "annotations": [
        {"question_id": 100 + i, "image_id": i % 3, "answers": PEOPLE, "multiple_choice_answer": "yes",
         "question_type": "is it", "answer_type": "yes/no"}
        for i in range(6)
    ]
}  # fmt: skip
XVLM = {
    "retrieval": [{"image": f"images/{n}.jpg", "caption": [f"a {n}", "b"], "image_id": f"c_{n}"} for n in range(3)],
    "vqa": [
        {"image": f"images/{n}.jpg", "question": "what?", "question_id": n, "answer": ["cat"] * 8 + ["dog"] * 2,
         "dataset": "vqa"}
        for n in range(3)
    ],
    "nlvr": [
        {"images": [f"images/{n}.jpg", "images/0.jpg"], "sentence": f"both {n}", "label": "True",
         "identifier": f"dev-{n}-0-0"}
        for n in range(3)
    ],
}  # fmt: skip


def _converted(arguments: Sequence[str], split: str = "train") -> Callable[[Path], int]:
    """Convert with --out FOLDER/out; what was taken must verify, and hold images that are among the raw ones."""

    def read(folder: Path) -> int:
        words = [word.replace("@", f"{folder}/") for word in arguments]
        code = main([*words, "--split", split, "--out", f"{folder}/out", "--max-dropped", "1"])
        if code == 0:
            check_split(folder, folder / "out" / split)
        return code

    return read


def check_split(folder: Path, prepared: Path) -> None:
    """Raise Wrong where a split that was just prepared holds what its raw files do not."""
    manifest = read_manifest(prepared)
    raw = {hashlib.sha256(path.read_bytes()).digest() for path in folder.glob("images/*")}
    inside = b"".join(path.read_bytes() for path in folder.glob("images/*") if path.suffix in (".tar", ".parquet"))
    rows = [row for shard in manifest["shards"] for row in read_rows(prepared / shard["file"], manifest["kind"])]
    if len(rows) != manifest["rows"]:
        raise Wrong(f"{len(rows)} rows, the manifest says {manifest['rows']}")
    for row in rows:
        for column in IMAGE_COLUMNS[manifest["kind"]]:
            image = row[column]
            if hashlib.sha256(image).digest() not in raw and image not in inside:
                raise Wrong(f"an image of {len(image)} bytes is stored that is not among the raw ones")
        for text in row[SAMPLE_COLUMN[manifest["kind"]]]:
            if not isinstance(text, str) or not text.strip() or "\x00" in text:
                raise Wrong(f"text {text!r} is stored")
    if main(["verify", str(prepared.parent)]):
        raise Wrong("what was prepared does not verify")


def _converter(name: str, files: dict[str, bytes], *arguments: str, victims: Sequence[str] = (), **more: Any) -> Target:
    found = victims or [file for file in files if not file.startswith("images/")]
    return Target(name, IMAGES | files, found, _converted(arguments, **more))


def converters() -> list[Target]:
    """A target for each annotation form."""
    at = "--annotations"
    images = ("--images", "@images")
    tsv = lines(f"a caption of {n}\t{n}.jpg" for n in range(3))
    records = lines(json.dumps({"caption": f"a caption of {n}", "image": f"{n}.jpg"}) for n in range(3))
    token = lines(f"{n}.jpg#{i}\tcaption {i} of {n}" for n in range(3) for i in range(2))
    nlvr = lines(
        json.dumps({"identifier": f"train-{n}-0-0", "sentence": "a b", "label": "True", "left_url": "", "directory": 1})
        for n in range(3)
    )
    pairs = {f"images/train-{n}-0-img{side}.png": image_of(n + side, 24) for n in range(3) for side in (0, 1)}
    listed = dumped([{"image": "images/0.jpg", "caption": ["a"]}])
    found = [
        _converter("coco", {"c.json": dumped(COCO)}, "coco", at, "@c.json", *images),
        _converter("karpathy", {"k.json": dumped(KARPATHY)}, "coco", at, "@k.json", "--images", "@"),
        _converter("exclude", {"x.json": listed, "c.json": dumped(COCO)}, "coco", at, "@c.json", *images, "--exclude",
                   "@x.json", victims=["x.json"]),
        _converter("exclude-text", {"x.txt": b"0.jpg\n1\n", "c.json": dumped(COCO)}, "coco", at, "@c.json", *images,
                   "--exclude", "@x.txt", victims=["x.txt"]),
        _converter("visual-genome", {"r.json": dumped(REGIONS), "i.json": dumped(VG_IMAGES)}, "visual-genome",
                   "--regions", "@r.json", "--image-data", "@i.json", "--text-cleaning", "eve", *images),
        _converter("sbu-tsv", {"s.tsv": tsv}, "sbu", at, "@s.tsv", "--columns", "caption", "file", *images),
        _converter("cc3m-lines", {"s.jsonl": records}, "cc3m", at, "@s.jsonl", "--text-cleaning", "xvlm", *images),
        _converter("cc3m-gz", {"s.jsonl.gz": gzip.compress(records, mtime=0)}, "cc3m", at, "@s.jsonl.gz", *images),
        _converter("cc12m-json", {"s.json": b"[" + b",".join(records.split(b"\n")[:-1]) + b"]"}, "cc12m", at,
                   "@s.json", *images),
        _converter("flickr-token", {"f.token": token}, "flickr30k", at, "@f.token", *images),
        _converter("flickr-karpathy", {"k.json": dumped(KARPATHY)}, "flickr30k", at, "@k.json", *images),
        _converter("vqav2", {"q.json": dumped(QUESTIONS), "a.json": dumped(ANSWERS), "v.json": dumped(VG_QUESTIONS),
                             **COCO_IMAGES},
                   "vqav2", "--questions", "@q.json", at, "@a.json", "--min-answers", "1", "--visual-genome", "@v.json",
                   "--visual-genome-images", "@images", *images),
        _converter("answer-list", {"q.json": dumped(QUESTIONS), "a.json": dumped(ANSWERS), "l.json": b'["yes", "no"]',
                                   **COCO_IMAGES},
                   "vqav2", "--questions", "@q.json", at, "@a.json", "--answer-list", "@l.json", *images,
                   victims=["l.json"]),
        _converter("vg-qa", {"v.json": dumped(VG_QUESTIONS)}, "visual-genome-qa", "--questions", "@v.json",
                   "--min-answers", "1", *images),
        _converter("nlvr2", {"n.jsonl": nlvr, **pairs}, "nlvr2", at, "@n.jsonl", *images, victims=["n.jsonl"]),
    ]  # fmt: skip
    for task, value in XVLM.items():
        more = ("--min-answers", "1") if task == "vqa" else ()
        files = {"x.json": dumped(value)}
        found.append(_converter(f"xvlm-{task}", files, "json", "--task", task, at, "@x.json", "--images", "@", *more))
    return [*found, *_downloads(), _images()]


def _downloads() -> list[Target]:
    """img2dataset's tars, Parquet files and folders."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for n in range(3):
            for suffix, data in (("jpg", IMAGES[f"images/{n}.jpg"]), ("txt", b"caption %d" % n), ("json", b'{"a": 1}')):
                info = tarfile.TarInfo(f"00000{n}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    table = pa.table(
        {
            "jpg": pa.array([IMAGES[f"images/{n}.jpg"] for n in range(3)], pa.binary()),
            "caption": [f"caption {n}" for n in range(3)],
            "key": [f"00000{n}" for n in range(3)],
            "status": ["success"] * 3,
        }
    )
    parquet = io.BytesIO()
    pq.write_table(table, parquet, compression="none", use_dictionary=False)  # images as they are
    loose = {f"images/00000/00000{n}.txt": b"caption %d" % n for n in range(3)}
    loose |= {f"images/00000/00000{n}.json": dumped({"caption": f"caption {n}", "url": "u"}) for n in range(3)}
    loose |= {f"images/00000/00000{n}.jpg": IMAGES[f"images/{n}.jpg"] for n in range(3)}
    name, split = "images/00000.tar", "train"
    words = ["img2dataset", "--images", "@images"]
    return [
        Target("tar", {name: buffer.getvalue()}, [name], _converted(words, split)),
        Target("parquet", {"images/00000.parquet": parquet.getvalue()}, ["images/00000.parquet"], _converted(words)),
        Target("loose", loose, list(loose), _loose([*words, "--format", "files"])),
    ]


def _loose(words: Sequence[str]) -> Callable[[Path], int]:
    def read(folder: Path) -> int:
        code = main([*(word.replace("@", f"{folder}/") for word in words), "--split", "train", "--out",
                     f"{folder}/out", "--max-dropped", "1"])  # fmt: skip
        return code or main(["verify", f"{folder}/out"])

    return read


def _images() -> Target:
    return Target(
        "image", IMAGES | {"c.json": dumped(COCO)}, list(IMAGES),
        _converted(["coco", "--annotations", "@c.json", "--images", "@images"]),
    )  # fmt: skip


def tools() -> list[Target]:
    """verify, its --repair, inspect and duplicates over damaged shards and manifests."""

    def damaged_set(make: Callable[..., Path]) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as scratch:
            make(Path(scratch), 5, shard_rows=3)
            return tree_of(Path(scratch))

    def verified(folder: Path) -> int:
        return main(["verify", str(folder)])

    def repaired(folder: Path) -> int:
        code = main(["verify", str(folder), "--repair", "--accept-changed"])
        if code == 0 and main(["verify", str(folder)]):
            raise Wrong("repaired, it does not verify")
        return code

    def looked_at(folder: Path) -> int:
        main(["duplicates", "hash", str(folder), "--out", f"{folder}/hashes.npz"])
        shutil.rmtree(folder / "page", ignore_errors=True)
        return main(["inspect", str(folder), "--rows", "3"])

    sets = {make.__name__[5:-4]: damaged_set(make) for make in (make_caption_set, make_vqa_set, make_nlvr_set)}
    return [
        Target(f"{name}-{kind}", files, list(files), read)
        for kind, files in sets.items()
        for name, read in (("verify", verified), ("repair", repaired), ("inspect", looked_at))
    ]
