"""Is one model better than another, or were the examples kind to it? A paired test of files of predictions.

    python -m evaluation.compare A.npz B.npz                              retrieval: score arrays
    python -m evaluation.compare A.json B.json --annotations ANN.json     VQA v2 results
    python -m evaluation.compare A.csv B.csv --annotations SPLIT.json     NLVR2: identifier,prediction

Each file after the first is compared with the first, over the same examples. Every metric has its difference with a
95 % interval and a two-sided p, from a paired bootstrap over clusters: an image with its texts or questions, a sentence
with its pairs of images. VQA and NLVR2 also have McNemar's exact test, which counts the examples on which one of the
two is better (VQA: scores higher). p is not corrected for the number of tests.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation import bootstrap, nlvr, retrieval, vqa
from evaluation.bootstrap import LEVEL, PAIRED_DRAWS, Parts
from evaluation.common import (
    InputError,
    Parser,
    check_regular,
    first_few,
    printable,
    read_json_rows,
    run,
    write_scores,
)
from evaluation.significance import sign_test

TASKS = ("retrieval", "vqa", "nlvr")
FORMS = {"retrieval": "{:.2f}", "vqa": "{:.2f}", "nlvr": "{:.4f}"}  # NLVR2's metrics are fractions
BYTES = 64  # of a file that tell what it is


@dataclass(frozen=True)
class Scored:
    """A file of predictions with its scores.

    Attributes:
        path: of the file.
        examples: how many there are, by what they are.
        parts: of its metrics.
        values: [N] score of each example, the higher the better; None where there is no such test.
    """

    path: str
    examples: dict[str, int]
    parts: Parts
    values: NDArray[Any] | None = None


def kind_of(path: str) -> str:
    """The task that a file of predictions is of, by its content.

    Raises:
        InputError: it cannot be read, or is empty.
    """
    check_regular(path)
    try:
        with open(path, "rb") as file:
            start = file.read(BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    if not start:
        raise InputError(f"{path}: holds no predictions")
    if start.startswith((b"PK", b"\x93NUMPY")):
        return "retrieval"
    return "vqa" if start[:1] in b"[{" else "nlvr"


def read_retrieval(paths: Sequence[str]) -> list[Scored]:
    """Raises InputError naming a file that cannot be read, or is of other images and texts than the first."""
    found: list[Scored] = []
    first: NDArray[np.integer] = np.empty(0, np.int64)
    for path in paths:
        texts, images, index = retrieval.file_ranks(path)
        sizes = {"images": len(texts), "texts": len(index)}
        if not found:
            first = index
        elif sizes != found[0].examples:
            here, there = (
                " and ".join(f"{n} {what}" for what, n in each.items()) for each in (sizes, found[0].examples)
            )
            raise InputError(f"{path}: has {here}, but {paths[0]} has {there}; compare the same split")
        elif len(moved := np.flatnonzero(index != first)):
            where = f"text {moved[0]} is of image {index[moved[0]]}, there of {first[moved[0]]}"
            raise InputError(f"{path}: {len(moved)} texts are of other images than in {paths[0]}: {where}")
        parts = bootstrap.retrieval_parts(texts, images, index, retrieval.CUTOFFS)
        found.append(Scored(path, sizes, parts))
    return found


def read_vqa(paths: Sequence[str], annotations: str, questions: str | None) -> list[Scored]:
    """Raises InputError naming a file that cannot be read or does not answer the same questions as the first."""
    rows = {path: vqa.read_list(path, None) for path in paths}
    truths = vqa.read_annotations(annotations, questions)
    answered = {}
    for path in paths:
        with _naming(path):
            answered[path] = vqa.by_id(rows[path], "prediction", lambda row, where: None).keys()
    found = []
    for path in paths:
        same_examples(path, answered[path], paths[0], answered[paths[0]], "questions")
        with _naming(f"{path} against {annotations}"):
            scores = vqa.per_question(rows[path], truths)
        parts = bootstrap.vqa_parts(scores, truths, ("answer_type",))
        sizes = {"questions": len(scores), "clusters": parts.clusters}
        found.append(Scored(path, sizes, parts, np.array(list(scores.values()))))
    return found


def read_nlvr(paths: Sequence[str], annotations: str) -> list[Scored]:
    """Raises InputError naming a file that cannot be read or does not judge the same statements as the first."""
    given = {path: nlvr.read_predictions(path) for path in paths}
    truths = read_json_rows(annotations)
    found = []
    for path, predictions in given.items():
        same_examples(path, predictions, paths[0], given[paths[0]], "statements")
        with _naming(f"{path} against {annotations}"):
            right = nlvr.per_example(predictions, truths)
        parts = bootstrap.nlvr_parts(list(right.values()), [nlvr.sentence_of(identifier) for identifier in right])
        sizes = {"statements": len(right), "sentences": parts.clusters}
        found.append(Scored(path, sizes, parts, np.array(list(right.values()))))
    return found


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Errors begin with ``what``."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def same_examples(
    path: str, examples: Collection[Hashable], first: str, wanted: Collection[Hashable], what: str
) -> None:
    """Raise InputError, counting and listing what is missing and what is extra, unless both are the same."""
    apart = {"missing": [each for each in wanted if each not in examples]}
    apart["extra"] = [each for each in examples if each not in wanted]
    told = [f"{len(some)} {word} ({first_few(some)})" for word, some in apart.items() if some]
    if told:
        raise InputError(f"{path}: does not have the {what} of {first}: {', '.join(told)}; compare the same split")


def comparison(first: Scored, other: Scored) -> dict[str, Any]:
    """Every metric of both with difference, interval and p; and McNemar's test."""
    ours, theirs = first.parts.scores(), other.parts.scores()
    metrics = {
        name: {"first": ours[name], "second": theirs[name], **asdict(found)}
        for name, found in bootstrap.paired(first.parts, other.parts).items()
    }
    result: dict[str, Any] = {"second": other.path, "metrics": metrics}
    if first.values is not None and other.values is not None:
        test = sign_test(first.values, other.values)
        result["mcnemar"] = {"better": test.second, "worse": test.first, "p": test.p}
    return result


def table(found: dict[str, Any], form: str) -> str:
    """A comparison for a terminal."""
    lines = [("", "first", "second", "difference", "95 % interval", "p")]
    for name, row in found["metrics"].items():
        signed = form.replace(":", ":+")
        interval = f"[{signed.format(row['low'])}, {signed.format(row['high'])}]"
        values = (form.format(row["first"]), form.format(row["second"]), signed.format(row["difference"]))
        lines.append((name, *values, interval, _p(row["p"])))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join((line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:]))).rstrip() for line in lines]
    if test := found.get("mcnemar"):
        text.append(
            f"McNemar's exact test: better on {test['better']} examples, worse on {test['worse']}, p {_p(test['p'])}"
        )
    return "\n".join(text)


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 0.0005 else "< 0.0005"


def main(arguments: list[str] | None = None) -> None:
    """The command ``python -m evaluation.compare``."""
    parser = Parser(prog="python -m evaluation.compare", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="predictions, two files or more of one kind")
    parser.add_argument("--task", choices=TASKS, help="what they are of; by default their content tells")
    parser.add_argument("--annotations", metavar="A.json", help="VQA, NLVR2: the right answers, the official file")
    parser.add_argument("--questions", metavar="Q.json", help="VQA: compare on these alone, an official file")
    parser.add_argument("--out", metavar="M.json", help="where the comparisons go, as JSON")
    options = parser.parse_args(arguments)
    files: list[str] = options.files
    if len(files) < 2:
        parser.error(f"there is one file of predictions, {files[0]}; name two or more")
    if len(set(files)) < len(files):
        parser.error(f"{next(path for path in files if files.count(path) > 1)} is named twice")
    kinds = [options.task] * len(files) if options.task else [kind_of(path) for path in files]
    for path, kind in zip(files, kinds, strict=True):
        if kind != kinds[0]:
            raise InputError(f"{path}: holds predictions of {kind}, but {files[0]} of {kinds[0]}; compare one task")
    task = kinds[0]
    if (options.annotations is None) != (task == "retrieval"):
        need = "hold the right answers themselves; leave --annotations out" if options.annotations else None
        parser.error(f"files of {task} {need or 'need --annotations, the file of right answers'}")
    if options.questions and task != "vqa":
        parser.error(f"--questions is for VQA, and these files are of {task}")
    if task == "retrieval":
        scored = read_retrieval(files)
    elif task == "vqa":
        scored = read_vqa(files, options.annotations, options.questions)
    else:
        scored = read_nlvr(files, options.annotations)
    found = [comparison(scored[0], other) for other in scored[1:]]
    sizes = scored[0].examples
    result = {"task": task, "first": files[0], "examples": sizes, "level": LEVEL, "draws": PAIRED_DRAWS}
    text = f"first: {printable(files[0])}, {', '.join(f'{n:,} {what}' for what, n in sizes.items())}"
    text += "".join(f"\n\nsecond: {printable(each['second'])}\n{table(each, FORMS[task])}" for each in found)
    if options.out:
        write_scores(options.out, {**result, "comparisons": found}, text)
    else:
        print(text)


if __name__ == "__main__":
    sys.exit(run(main))
