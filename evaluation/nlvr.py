"""NLVR2: accuracy and consistency, as the official ``nlvr2/eval/metrics.py`` of lil-lab/nlvr (Suhr et al., ACL 2019).

An example's identifier is ``split-set-PAIR-sentence``. Examples that differ only in PAIR have the same sentence.
Consistency is the fraction of sentences for which all examples are right.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evaluation import bootstrap
from evaluation.common import (
    InputError,
    Parser,
    excerpt,
    first_few,
    naming,
    printable,
    read_json_rows,
    read_text,
    run,
    write_scores,
)

TRUTHS = ("true", "false")
# The first field of an identifier, and what papers call the split. The labels of test-U are not published.
OFFICIAL_SPLITS = {"train": "train", "dev": "dev", "test1": "test-P", "test2": "test-U"}


def score(predictions: Mapping[str, str], examples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Accuracy over the examples and consistency over their sentences.

    Args:
        predictions: identifier -> "True" or "False", in upper or lower case. Identifiers without an example are
            ignored: one file can be used for the balanced and the unbalanced parts of a split, which are subsets.
        examples: the official objects; ``identifier`` and ``label`` are read.
    Returns:
        ``{"accuracy": ..., "consistency": ...}`` as fractions.
    Raises:
        InputError: an example without prediction, a duplicate identifier, a value that is neither true nor false.
    """
    return summary(per_example(predictions, examples, allow_extra=True))


def per_example(
    predictions: Mapping[str, str], examples: Sequence[Mapping[str, Any]], allow_extra: bool
) -> dict[str, bool]:
    """{identifier: whether its prediction is right}, in the order of the examples.

    Arguments and errors are those of ``score``; but with ``allow_extra``, a prediction without an example is one, too.
    """
    if not examples:
        raise InputError("there are no examples to score")
    labels: dict[str, str] = {}
    for row, example in enumerate(examples, 1):
        identifier, label = _read_example(example, row)
        if identifier in labels:
            raise InputError(f"example {row}: identifier {excerpt(identifier)} occurs twice")
        labels[identifier] = label
    missing = [identifier for identifier in labels if identifier not in predictions]
    if missing:
        raise InputError(f"{len(missing)} of {len(labels)} examples have no prediction: {first_few(missing)}")
    if not allow_extra and (extra := [identifier for identifier in predictions if identifier not in labels]):
        raise InputError(
            f"{len(extra)} of {len(predictions)} predictions are for no example: {first_few(extra)}; --allow_extra "
            "leaves them out, as for the balanced and unbalanced parts of a split"
        )
    right = {}
    for identifier, label in labels.items():
        if (answer := predictions[identifier].lower()) not in TRUTHS:
            raise InputError(
                f"prediction of {excerpt(identifier)} is {excerpt(predictions[identifier])}, neither True nor False"
            )
        right[identifier] = answer == label
    return right


def summary(right: Mapping[str, bool]) -> dict[str, float]:
    """What ``score`` returns, of the examples that are right or wrong."""
    consistent: dict[tuple[str, ...], bool] = {}
    for identifier, answered in right.items():
        sentence = sentence_of(identifier)
        consistent[sentence] = consistent.get(sentence, True) and answered
    return {"accuracy": sum(right.values()) / len(right), "consistency": sum(consistent.values()) / len(consistent)}


def sentence_of(identifier: str) -> tuple[str, ...]:
    """What examples of one sentence have in common: the identifier without its third field, the pair."""
    parts = identifier.split("-")
    return (*parts[:2], *parts[3:])


def _read_example(example: Any, row: int) -> tuple[str, str]:
    """Identifier and lower-case label of one official example."""
    if not isinstance(example, Mapping) or not isinstance(example.get("identifier"), str):
        raise InputError(f"example {row}: no JSON object with a text 'identifier'")
    identifier, label = example["identifier"], example.get("label")
    if identifier.count("-") < 3:
        raise InputError(f"example {row}: identifier {excerpt(identifier)} does not read split-set-pair-sentence")
    if str(label).lower() not in TRUTHS:
        raise InputError(f"example {row}: label of {excerpt(identifier)} is {excerpt(label)}, neither True nor False")
    return identifier, str(label).lower()


def official_split(identifiers: Iterable[str]) -> str:
    """The name of the split that the identifiers are of, such as "test-P"; "dev + test-P" of two, "" of others."""
    found = {OFFICIAL_SPLITS.get(identifier.split("-")[0], "") for identifier in identifiers}
    return "" if "" in found else " + ".join(sorted(found))


def read_predictions(path: str) -> dict[str, str]:
    """Read a file of ``identifier,prediction`` lines. Raises InputError: unreadable, and as ``parse_predictions``."""
    return parse_predictions(read_text(path), path)


def parse_predictions(text: str, path: str) -> dict[str, str]:
    """{identifier: prediction} of the lines of a file; a first line with these two words is a header.

    Raises:
        InputError: empty, a line of another form, or an identifier twice; the message has the line.
    """
    predictions: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        fields = [field.strip() for field in line.split(",")]
        if fields == [""] or (number == 1 and fields == ["identifier", "prediction"]):
            continue
        if len(fields) != 2 or fields[1].lower() not in TRUTHS:
            raise InputError(f"{path}: line {number}: {excerpt(line)} is not 'identifier,True' or 'identifier,False'")
        if fields[0] in predictions:
            raise InputError(f"{path}: line {number}: identifier {excerpt(fields[0])} occurs twice")
        predictions[fields[0]] = fields[1]
    if not predictions:
        raise InputError(f"{path}: holds no predictions")
    return predictions


def main(arguments: list[str] | None = None) -> None:
    """The command ``python -m evaluation.nlvr``."""
    parser = Parser(prog="python -m evaluation.nlvr", description=__doc__)
    parser.add_argument("--predictions", required=True, metavar="P.csv", help="lines of identifier,prediction")
    parser.add_argument(
        "--annotations", required=True, metavar="SPLIT.json", help="the official JSON lines, or a JSON list of them"
    )
    parser.add_argument(
        "--out", required=True, metavar="M.json", help="where accuracy and consistency go, as fractions"
    )
    bootstrap.add_option(parser)
    parser.add_argument(
        "--allow_extra", action="store_true", help="leave predictions for other examples out, instead of refusing them"
    )
    options = parser.parse_args(arguments)
    predictions = read_predictions(options.predictions)
    examples = read_json_rows(options.annotations)
    with naming(f"{options.predictions} against {options.annotations}"):
        right = per_example(predictions, examples, options.allow_extra)
    scores = summary(right)
    parts = bootstrap.nlvr_parts(list(right.values()), [sentence_of(identifier) for identifier in right])
    found = bootstrap.confidence(parts) if options.intervals else {}
    line = " ".join(f"{name} {bootstrap.shown(value, found.get(name), '.4f')}" for name, value in scores.items())
    split = official_split(right)
    note = f"({split + ', ' if split else ''}{len(examples)} examples)"
    write_scores(options.out, bootstrap.beside(scores, found), f"{line} {note}")
    if len(predictions) > len(examples):
        extra = len(predictions) - len(examples)
        note = f"note: {extra} predictions belong to no example of {options.annotations} and were not counted"
        print(printable(note), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(main))
