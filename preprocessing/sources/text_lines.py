"""`python -m preprocessing texts`: text files, a sentence a line -> caption shards without images.

For pre-training on texts alone: a source of `data.sources` with `modality: text`. Files may be compressed (.gz). Blank
lines are passed over. A line's id is SPLIT-FILE-LINE, FILE without its endings, lines counted from 1.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from preprocessing.errors import UserError
from preprocessing.formats.annotations import BadRecord, find_copies, text_lines
from preprocessing.running.storage import StoragePath, storage_path
from preprocessing.sources.converter import add_common_arguments, check_common_arguments, write_split
from preprocessing.sources.lazy_rows import LazyRows
from preprocessing.sources.source import Faults, Row, Source
from preprocessing.text.cleaning import TextCleaning, add_text_argument, text_cleaning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `texts`."""
    parser.add_argument("--texts", required=True, nargs="+", metavar="FILE", help="text files, a sentence a line")
    add_text_argument(parser)
    add_common_arguments(parser, images=False, texts_only=True)


def run(args: argparse.Namespace) -> None:
    """Convert one split. Raises UserError on bad input."""
    check_common_arguments(args, "caption")
    write_split(read_texts(args.texts, args.split, text_cleaning(args)), args)


def read_texts(files: Sequence[str], split: str, cleaning: TextCleaning) -> Source:
    """A row for each line that is not blank. Raises UserError naming the file at fault."""
    for first, other in find_copies(files):
        raise UserError(f"{first} and {other}: are one file under two names; give it once")
    paths = [storage_path(name) for name in files]
    stems = Counter(path.name.split(".")[0] for path in paths)
    if again := [stem for stem, count in stems.items() if count > 1]:
        raise UserError(f"--texts: two files are called {again[0]}, which ids of lines begin with; rename one")
    source = Source("caption", [], paths, {"lines": 0}, modality="text")
    source.rows = LineTexts(paths, split, cleaning, source)
    return source


class LineTexts(LazyRows):
    """The lines of text files. They are read once to count them, and once more to write them; none is kept."""

    def __init__(self, files: Sequence[StoragePath], split: str, cleaning: TextCleaning, source: Source) -> None:
        """Count the lines: those that become rows, those left out, the faults. Raises UserError naming the file."""
        self._files, self._split, self._cleaning = files, split, cleaning
        self._length = 0
        for _, text in self._lines(source.faults):
            source.counts["lines"] += 1
            self._length += bool(cleaning.captions([text], source.left_out))

    def _lines(self, faults: Faults) -> Iterator[tuple[str, str]]:
        """(id, text) of each line that is not blank."""
        for path in self._files:
            stem = path.name.split(".")[0]
            for number, line in text_lines(path):
                if isinstance(line, BadRecord):
                    faults.add(line)
                elif line.strip():
                    yield f"{self._split}-{stem}-{number}", line

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Row]:
        count = 0
        for name, text in self._lines(Faults()):
            if kept := self._cleaning.captions([text]):
                count += 1
                yield Row(name, (), {"caption": kept, "image_id": name})
        if count != self._length:
            files = ", ".join(map(str, self._files))
            raise UserError(f"{files}: {count} lines, {self._length} when the run began; start again")

    def row(self, index: int) -> Row:
        """See LazyRows. Reads all lines before it."""
        return next(islice(self, index, None))
