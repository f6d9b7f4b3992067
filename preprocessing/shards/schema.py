"""What a prepared data set looks like on disk: its files and the columns of its shards. A leaf that anyone may import.

DIR/answer_list.json                    VQA only: JSON list of strings; an answer's label is its index
DIR/{train,val,test}/shard-00000.arrow  Arrow IPC file format, several record batches a file
                     manifest.json      counts, sizes and hashes: the same bytes for the same input
                     ids.bin            the ids as keys of eight bytes each, by which splits are compared
                     provenance.json    command, host, time, versions: differs from run to run
"""

import pyarrow as pa

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
IDS = "ids.bin"  # see preprocessing/shards/ids.py
IDS_VERSION = 2  # of the keys in it; an older file is ignored and the id columns are read instead
ANSWER_LIST = "answer_list.json"
SPLITS = ("train", "val", "test")

# One row an image: `caption` holds all its captions. A sample is (row, caption index).
CAPTION_SCHEMA = pa.schema(
    [
        ("image", pa.binary()),  # the image file's own bytes; re-encoded by --max-side alone
        ("caption", pa.list_(pa.string())),
        ("image_id", pa.string()),
        ("split", pa.string()),
    ]
)

# One row an image: the outer lists run over its questions. A sample is (row, question index). `answers`,
# `answer_labels` and `answer_scores` hold the answers of a question that are in the answer list.
VQA_SCHEMA = pa.schema(
    [
        ("image", pa.binary()),
        ("questions", pa.list_(pa.string())),
        ("answers", pa.list_(pa.list_(pa.string()))),
        ("answer_labels", pa.list_(pa.list_(pa.int64()))),
        ("answer_scores", pa.list_(pa.list_(pa.float32()))),
        ("question_id", pa.list_(pa.int64())),
        ("image_id", pa.string()),
        ("split", pa.string()),
    ]
)

# One row a pair of images: the lists run over its statements. A sample is (row, statement index).
NLVR_SCHEMA = pa.schema(
    [
        ("image_0", pa.binary()),  # left
        ("image_1", pa.binary()),  # right
        ("questions", pa.list_(pa.string())),
        ("answers", pa.list_(pa.string())),  # "True" or "False"
        ("identifier", pa.list_(pa.string())),  # split-set-PAIR-sentence
        ("split", pa.string()),
    ]
)

KINDS: dict[str, pa.Schema] = {"caption": CAPTION_SCHEMA, "vqa": VQA_SCHEMA, "nlvr": NLVR_SCHEMA}
IMAGE_COLUMNS: dict[str, tuple[str, ...]] = {"caption": ("image",), "vqa": ("image",), "nlvr": ("image_0", "image_1")}
SAMPLE_COLUMN: dict[str, str] = {"caption": "caption", "vqa": "questions", "nlvr": "questions"}  # its length = samples
# Ids that are unique in a data set: no row or sample of train is in val or test. The images of "nlvr" have no ids.
ID_COLUMNS: dict[str, tuple[str, ...]] = {
    "caption": ("image_id",),
    "vqa": ("image_id", "question_id"),
    "nlvr": ("identifier",),
}
