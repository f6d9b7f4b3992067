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

import io
import sys
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation import bootstrap, nlvr, retrieval, vqa
from evaluation.bootstrap import LEVEL, PAIRED_DRAWS, Parts
from evaluation.common import (
    InputError,
    Parser,
    decoded,
    first_few,
    naming,
    parse_json,
    printable,
    read_json_rows,
    reading,
    run,
    write_scores,
)
from evaluation.significance import sign_test

TASKS = ("retrieval", "vqa", "nlvr")
FORMS = {"retrieval": "{:.2f}", "vqa": "{:.2f}", "nlvr": "{:.4f}"}  # NLVR2's metrics are fractions
ARCHIVES = (b"PK", b"\x93NUMPY")  # what files of arrays begin with


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


def text_of(path: str) -> str | None:
    """The text of a file of predictions, which may be a pipe and is read once; None of a file of arrays.

    Raises:
        InputError: it cannot be read, or is empty.
    """
    with reading(path) as file:
        start = file.read(max(map(len, ARCHIVES)))
        if start.startswith(ARCHIVES):
            return None
        text = decoded(io.BytesIO(start + file.read()))
    if not text.strip():
        raise InputError(f"{path}: holds no predictions")
    return text


def kind_of(text: str | None) -> str:
    """The task that a file of predictions is of, by what ``text_of`` gives."""
    if text is None:
        return "retrieval"
    return "vqa" if text.lstrip()[0] in "[{" else "nlvr"


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


@vqa.no_garbage_collection()
def read_vqa(texts: Mapping[str, str], annotations: str, questions: str | None, allow_extra: bool) -> list[Scored]:
    """Raises InputError naming a file that cannot be read or does not answer the same questions as the first.

    Args:
        texts: of the files, by path.
        annotations: file of right answers.
        questions: file of the questions that count.
        allow_extra: answers to other questions are left out.
    """
    given = {path: vqa.listed(parse_json(text, path), path, None) for path, text in texts.items()}
    answered = {}
    for path, rows in given.items():
        with naming(path):
            answered[path] = vqa.by_id(rows, "prediction", lambda row: None).keys()
    allow_extra = allow_extra or questions is not None
    if not allow_extra:
        same_examples(answered, "questions")
    truths, against = vqa.read_annotations(annotations, questions)
    found = []
    for path, rows in given.items():
        with naming(f"{path} against {against}"):
            scores = vqa.per_question(rows, truths, allow_extra)
        parts = bootstrap.vqa_parts(scores, truths, ("answer_type",))
        sizes = {"questions": len(scores), "clusters": parts.clusters}
        found.append(Scored(path, sizes, parts, np.array(list(scores.values()))))
    return found


def read_nlvr(texts: Mapping[str, str], annotations: str, allow_extra: bool) -> list[Scored]:
    """Raises InputError naming a file that cannot be read or does not judge the same statements as the first.

    Arguments are those of ``read_vqa``.
    """
    given = {path: nlvr.parse_predictions(text, path) for path, text in texts.items()}
    if not allow_extra:
        same_examples(given, "statements")
    truths = read_json_rows(annotations)
    found = []
    for path, predictions in given.items():
        with naming(f"{path} against {annotations}"):
            right = nlvr.per_example(predictions, truths, allow_extra)
        parts = bootstrap.nlvr_parts(list(right.values()), [nlvr.sentence_of(identifier) for identifier in right])
        sizes = {"statements": len(right), "sentences": parts.clusters}
        found.append(Scored(path, sizes, parts, np.array(list(right.values()))))
    return found


def same_examples(given: Mapping[str, Collection[Hashable]], what: str) -> None:
    """Raise InputError, counting and listing what is missing and what is extra, unless all files have the same."""
    (first, wanted), *others = given.items()
    for path, examples in others:
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
        lines.append((printable(name), *values, interval, _p(row["p"])))
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
    parser.add_argument(
        "--allow_extra", action="store_true", help="VQA, NLVR2: leave predictions without a right answer out"
    )
    parser.add_argument("--out", metavar="M.json", help="where the comparisons go, as JSON")
    options = parser.parse_args(arguments)
    files: list[str] = options.files
    if len(files) < 2:
        parser.error(f"there is one file of predictions, {files[0]}; name two or more")
    if len(set(files)) < len(files):
        parser.error(f"{next(path for path in files if files.count(path) > 1)} is named twice")
    content = {path: text_of(path) for path in files}
    texts = {path: text for path, text in content.items() if text is not None}
    kinds = {path: kind_of(text) if text is None else options.task or kind_of(text) for path, text in content.items()}
    task = options.task or kinds[files[0]]
    for path, kind in kinds.items():
        if kind != task:
            wanted = "--task" if options.task else files[0]
            raise InputError(f"{path}: holds predictions of {kind}, but {wanted} is of {task}; compare one task")
    if (options.annotations is None) != (task == "retrieval"):
        need = "hold the right answers themselves; leave --annotations out" if options.annotations else None
        parser.error(f"files of {task} {need or 'need --annotations, the file of right answers'}")
    if options.questions and task != "vqa":
        parser.error(f"--questions is for VQA, and these files are of {task}")
    if options.allow_extra and task == "retrieval":
        parser.error("--allow_extra is for VQA and NLVR2, and these files are of retrieval")
    if task == "retrieval":
        scored = read_retrieval(files)
    elif task == "vqa":
        scored = read_vqa(texts, options.annotations, options.questions, options.allow_extra)
    else:
        scored = read_nlvr(texts, options.annotations, options.allow_extra)
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
