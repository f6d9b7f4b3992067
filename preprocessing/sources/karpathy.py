"""Karpathy's split files, dataset_coco.json and dataset_flickr30k.json (Karpathy and Fei-Fei 2015) -> caption rows.

{"dataset": "coco", "images": [{"filename", "filepath": "val2014", "cocoid", "imgid", "split", "sentids",
"sentences": [{"raw", "tokens", "imgid", "sentid"}]}]}; Flickr30k's lacks filepath and cocoid. COCO's splits are train,
restval (usually trained on as well), val and test.
"""

import posixpath
from typing import Any

from preprocessing.errors import UserError
from preprocessing.formats.annotations import BadRecord, field
from preprocessing.images.exclusion import EXCLUDED, ImageList
from preprocessing.images.image_folder import ImageFolder
from preprocessing.running.storage import StoragePath
from preprocessing.sources.source import Row, Source
from preprocessing.text.cleaning import TextCleaning

_SPLITS = ("train", "restval", "val", "test")


def is_karpathy(content: Any) -> bool:
    """Whether a JSON value is a Karpathy file."""
    images = content.get("images") if isinstance(content, dict) else None
    return isinstance(images, list) and bool(images) and isinstance(images[0], dict) and "sentences" in images[0]


def read_karpathy(
    content: Any,
    path: StoragePath,
    images: ImageFolder,
    split: str,
    cleaning: TextCleaning,
    excluded: ImageList,
    restval: bool = True,
) -> Source:
    """One row an image of `split`, in the order of the file; `train` includes restval unless `restval` is false.

    Raises UserError naming the record at fault.
    """
    wanted = ("train", "restval") if split == "train" and restval else (split,)
    source = Source("caption", [], [path], {"images": 0, "captions": 0})
    rows: list[Row] = []
    seen: set[str] = set()
    for index, record in enumerate(field(content, "images", list, f"{path}")):
        where = f"{path}: images[{index}]"
        with source.faults:
            found = field(record, "split", str, where)
            if found not in _SPLITS:
                what = f"split '{found}' is none of {', '.join(_SPLITS)}; is this the right file?"
                raise BadRecord(where, what, f"split is none of {', '.join(_SPLITS)}")
            file = field(record, "filename", str, where)
            image_id = posixpath.splitext(file)[0]
            if "cocoid" in record:
                image_id = str(field(record, "cocoid", (int, str), where))
            out = excluded.match(file, image_id)  # also for other splits: a list of another split is no mistake
            if found not in wanted:
                continue
            if image_id in seen:
                raise UserError(f"{where}: image {image_id} occurs twice; make ids unique")
            seen.add(image_id)
            sentences = []
            for sentence in field(record, "sentences", list, where):
                with source.faults:
                    sentences.append(field(sentence, "raw", str, where))
            source.counts["images"] += 1
            source.counts["captions"] += len(sentences)
            if out:
                source.left_out[EXCLUDED] += 1
                continue
            captions = cleaning.captions(sentences, source.left_out)
            if not captions:
                source.left_out["image without caption"] += 1
                continue
            name = f"{field(record, 'filepath', str, where)}/{file}" if record.get("filepath") else file
            rows.append(Row(file, (images.find(name),), {"caption": captions, "image_id": image_id}))
    source.rows = rows
    return source
