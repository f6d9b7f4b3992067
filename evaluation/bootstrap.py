"""How far a score would move with other test examples: percentile bootstrap over clusters, numpy alone.

Examples that share an image or a sentence are not independent: they are drawn together, as one cluster. A metric is a
ratio of sums over clusters, or a mean of such metrics, so that a resample is a product of two matrices. Two models are
compared over the same resamples.

C clusters, N examples, M metrics.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.common import Parser
from evaluation.significance import Interval, interval_of

DRAWS = 2_000  # for a confidence interval
PAIRED_DRAWS = 10_000  # for a test, whose p needs more
LEVEL = 0.95
DECIMALS = 6
_CELLS = 2_000_000  # of the matrix of weights that is drawn at a time: 16 MB
_MATRIX = 32_000_000  # numbers that a model's metrics take at a time: 256 MB
_GROUP = "/"  # between the two keys of a metric that is in a group, as in per_answer_type/number

Column = tuple[NDArray[Any], NDArray[np.integer]]  # values [n], their clusters [n]


@dataclass(frozen=True)
class Parts:
    """What the metrics of a model are made of.

    Attributes:
        columns: {metric: (values [n], their clusters [n], whole numbers from 0 to C - 1)}; the metric is their mean.
        clusters: C.
        means: {metric: names of the metrics that it is the mean of}; in ``columns``, or earlier here.
    """

    columns: Mapping[str, Column]
    clusters: int
    means: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def with_means(self, values: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        """``values`` of ``columns``, with those of ``means``."""
        found = dict(values)
        for name, of in self.means.items():
            found[name] = np.mean([found[each] for each in of], axis=0)
        return found

    def blocks(self, draws: int) -> Iterator[Parts]:
        """The same, some metrics at a time, so that neither ``matrix`` nor ``draws`` values of each take much memory.

        All at once where there are ``means``, which are of few metrics.
        """
        names = list(self.columns)
        size = len(names) if self.means else max(1, _MATRIX // (2 * max(self.clusters, draws)))
        for begin in range(0, len(names), size):
            some = {name: self.columns[name] for name in names[begin : begin + size]}
            yield Parts(some, self.clusters, self.means)

    def matrix(self) -> NDArray[np.float64]:
        """[C, 2 M]: the sum of each column in each cluster, then how many values there are."""
        pairs = self.columns.values()
        sums = [np.bincount(cluster, values.astype(np.float64), self.clusters) for values, cluster in pairs]
        counts = [np.bincount(cluster, minlength=self.clusters).astype(np.float64) for _, cluster in pairs]
        return np.stack([*sums, *counts], axis=1)

    def scores(self) -> dict[str, float]:
        """The metrics themselves."""
        values = {name: np.asarray(values.mean(dtype=np.float64)) for name, (values, _) in self.columns.items()}
        return {name: float(value) for name, value in self.with_means(values).items()}


def retrieval_parts(
    text_ranks: NDArray[np.int64],
    image_ranks: NDArray[np.int64],
    text_image_index: NDArray[np.integer],
    cutoffs: Sequence[int],
) -> Parts:
    """The recalls in percent; a cluster is an image with its texts. Ranks from 0, [I] and [T]; the index [T]."""
    columns: dict[str, Column] = {}
    means = {}
    own = np.arange(len(text_ranks))
    for query, ranks, cluster in (("txt", text_ranks, own), ("img", image_ranks, text_image_index)):
        names = tuple(f"{query}_r{k}" for k in cutoffs)
        columns |= {name: (100.0 * (ranks < k), cluster) for name, k in zip(names, cutoffs, strict=True)}
        means[f"{query}_r_mean"] = names
    return Parts(columns, len(own), means | {"r_mean": ("txt_r_mean", "img_r_mean")})


def vqa_parts(
    by_question: Mapping[Hashable, float],
    annotations: Sequence[Mapping[str, Any]],
    kinds: Sequence[str] = ("answer_type", "question_type"),
) -> Parts:
    """Accuracies in percent, overall and by type; a cluster is an image, or a question where images are not named.

    Args:
        by_question: accuracy of each question.
        annotations: the official objects of these questions; all of them may have an ``image_id``.
        kinds: of the types.
    """
    values = np.array([by_question[row["question_id"]] for row in annotations])
    images = [row.get("image_id") for row in annotations]
    cluster = numbered(images) if all(isinstance(image, int | str) for image in images) else np.arange(len(values))
    columns: dict[str, Column] = {"overall": (values, cluster)}
    for key in kinds:
        of = [row[key] for row in annotations]
        number = numbered(of)
        names = dict(zip(number.tolist(), of, strict=True))
        order = np.argsort(number, kind="stable")
        places = np.split(order, np.cumsum(np.bincount(number))[:-1])
        found = {names[group]: (values[place], cluster[place]) for group, place in enumerate(places)}
        columns |= {f"per_{key}{_GROUP}{name}": found[name] for name in sorted(found)}
    return Parts(columns, int(cluster.max()) + 1)


def nlvr_parts(right: Sequence[bool], sentences: Sequence[Hashable]) -> Parts:
    """Accuracy and consistency as fractions, of [N] examples; a cluster is a sentence."""
    answered, cluster = np.array(right, dtype=bool), numbered(sentences)
    consistent = np.bincount(cluster, ~answered) == 0
    columns = {"accuracy": (answered, cluster), "consistency": (consistent, np.arange(len(consistent)))}
    return Parts(columns, len(consistent))


def numbered(names: Sequence[Hashable | None]) -> NDArray[np.int64]:
    """[N] whole numbers from 0 in place of names, in the order in which these first occur."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(name, len(seen)) for name in names], dtype=np.int64)


def confidence(parts: Parts, draws: int = DRAWS, level: float = LEVEL, seed: int = 0) -> dict[str, list[float]]:
    """{metric: [low, high]}, the percentile interval of each metric (Efron & Tibshirani 1993, chapter 13).

    Where a metric is the same in all clusters, as when all answers are right, low and high are equal to it: resamples
    cannot tell what was never seen.

    Args:
        parts: of the model.
        draws: resamples of the clusters with replacement.
        level: of the intervals.
        seed: of the draws; the same gives the same result.
    """
    ends = [(1 - level) / 2, (1 + level) / 2]
    found = {}
    for block in parts.blocks(draws):
        for name, drawn in _resampled([block], draws, seed)[0].items():
            low, high = np.quantile(drawn[np.isfinite(drawn)], ends)
            found[name] = [round(float(low), DECIMALS), round(float(high), DECIMALS)]
    return found


def paired(
    first: Parts, second: Parts, draws: int = PAIRED_DRAWS, level: float = LEVEL, seed: int = 0
) -> dict[str, Interval]:
    """{metric: difference of two models, the second minus the first, with interval and p}.

    The parts must be of the same examples in the same order; other arguments as of ``confidence``.
    """
    result: dict[str, Interval] = {}
    for ours, theirs in zip(first.blocks(draws), second.blocks(draws), strict=True):
        result |= _paired(ours, theirs, draws, level, seed)
    return result


def _paired(first: Parts, second: Parts, draws: int, level: float, seed: int) -> dict[str, Interval]:
    base, other = _resampled([first, second], draws, seed)
    ours, theirs = first.scores(), second.scores()
    differ = {name: _differing(first, second, name) for name in first.columns}
    for name, of in first.means.items():
        differ[name] = np.logical_or.reduce([differ[each] for each in of])
    result = {}
    for name, drawn in base.items():
        difference = other[name] - drawn
        difference = difference[np.isfinite(difference)]
        result[name] = interval_of(difference, theirs[name] - ours[name], int(differ[name].sum()), level)
    return result


def _differing(first: Parts, second: Parts, name: str) -> NDArray[np.bool_]:
    """[C]: the clusters in which the sums of a column differ."""
    (ours, cluster), (theirs, _) = first.columns[name], second.columns[name]
    gaps = theirs.astype(np.float64) - ours.astype(np.float64)
    found: NDArray[np.bool_] = np.abs(np.bincount(cluster, gaps, first.clusters)) > 1e-9
    return found


def _resampled(models: Sequence[Parts], draws: int, seed: int) -> list[dict[str, NDArray[np.float64]]]:
    """For each model {metric: [draws] values}, of the same resamples; NaN where a resample has no example of it."""
    matrices = [parts.matrix() for parts in models]
    sums = [np.empty((draws, matrix.shape[1])) for matrix in matrices]
    begin = 0
    for weights in _weights(models[0].clusters, draws, seed):
        for matrix, own in zip(matrices, sums, strict=True):
            np.matmul(weights, matrix, out=own[begin : begin + len(weights)])
        begin += len(weights)
    result = []
    for parts, own in zip(models, sums, strict=True):
        totals, counts = np.split(own, 2, axis=1)
        with np.errstate(invalid="ignore"):
            values = totals / counts
        result.append(parts.with_means(dict(zip(parts.columns, values.T, strict=True))))
    return result


def _weights(clusters: int, draws: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """[some draws, C]: how often each cluster is in a resample of C of them."""
    generator = np.random.default_rng(seed)
    at_a_time = max(1, _CELLS // clusters)
    for begin in range(0, draws, at_a_time):
        weights = np.empty((min(at_a_time, draws - begin), clusters))
        for row in weights:
            row[:] = np.bincount(generator.integers(clusters, size=clusters), minlength=clusters)
        yield weights


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics in the form of the metric files: ``per_answer_type/number`` becomes a key in a group."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        group, separator, key = name.partition(_GROUP)
        if separator:
            tree.setdefault(group, {})[key] = value
        else:
            tree[name] = value
    return tree


def shown(value: float, interval: Sequence[float] | None, form: str) -> str:
    """A score for a line of them: ``58.00 [54.10, 61.90]``, or alone."""
    return f"{value:{form}}" + (f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else "")


def beside(scores: Mapping[str, Any], found: Mapping[str, list[float]]) -> dict[str, Any]:
    """The content of a file of scores: these, and under ``intervals`` what ``confidence`` found, if anything."""
    return {**scores, **({"intervals": nested(found)} if found else {})}


def add_option(parser: Parser) -> None:
    """The option ``--intervals`` of a command."""
    text = "also 95 %% confidence intervals, by bootstrap: [low, high] of each metric under the key intervals"
    parser.add_argument("--intervals", action="store_true", help=text)
