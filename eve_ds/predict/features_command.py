"""``features``: unit vectors of images and texts in a file, .npz or .arrow."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from eve_ds.predict.eve import EVE
from preprocessing.errors import UserError, printable
from preprocessing.local_files import check_regular, replace_surrogates, write_atomic

SUFFIXES = (".npz", ".arrow")


def read_texts(path: str) -> list[str]:
    """The lines of a UTF-8 file. Raises UserError naming the file, and the line if one is blank or no UTF-8."""
    check_regular(path, streams=True)
    try:
        content = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape").rstrip("\n")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: {getattr(error, 'strerror', None) or error}; give a file with a text a line"
        ) from None
    texts = content.split("\n") if content else []  # splitlines would split at U+2028 and others, too
    for number, text in enumerate(texts, 1):
        if replace_surrogates(text) != text:  # half a pair: a byte that could not be decoded
            raise UserError(f"{path}:{number}: is not UTF-8; write the line as UTF-8")
        if not text.strip():
            raise UserError(f"{path}:{number}: is blank; write a text on each line")
    return texts


def write_features(
    load: Callable[[], EVE], images: Sequence[str], texts_file: str | None, out: str, as_json: bool = False
) -> None:
    """Encode images and texts and write the vectors.

    Args:
        load: the model; called when the other arguments are known to be good.
        images: paths.
        texts_file: a text a line, or None.
        out: .npz with ``images`` [N, E] float32 and ``image_names`` [N], ``texts`` [M, E] and ``text_names`` [M]; or
            .arrow with the columns kind (image or text), name and vector.
        as_json: print what was written as a JSON object.
    Raises:
        UserError: nothing to encode, a bad input, or another suffix.
    """
    suffix = Path(out).suffix
    if suffix not in SUFFIXES:
        raise UserError(f"--out {out}: name a file that ends in {' or '.join(SUFFIXES)}")
    texts = read_texts(texts_file) if texts_file is not None else []
    if not images and not texts:
        raise UserError("nothing to encode: give image files, or --texts FILE with a text a line")
    eve = load()
    image_vectors, text_vectors = eve.image_features(list(images)), eve.text_features(texts)
    names = [replace_surrogates(name) for name in images]
    buffer = io.BytesIO()
    if suffix == ".npz":
        np.savez(
            buffer,
            images=image_vectors,
            image_names=np.array(names, dtype=str),
            texts=text_vectors,
            text_names=np.array(texts, dtype=str),
        )
    else:
        vectors = np.concatenate([image_vectors, text_vectors])
        table = pa.table(
            {
                "kind": ["image"] * len(names) + ["text"] * len(texts),
                "name": [*names, *texts],
                "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
            }
        )
        with pa.ipc.new_file(buffer, table.schema) as writer:
            writer.write_table(table)
    write_atomic(out, buffer.getvalue())
    done = {"images": len(names), "texts": len(texts), "dim": eve.feature_dim, "out": out}
    line = f"wrote {len(names)} images and {len(texts)} texts, vectors of {eve.feature_dim}, to {printable(out)}"
    print(json.dumps(done) if as_json else line)
