"""Parameters -> layers: which parameters count together, and what a step's statistics say of each layer.

A model has thousands of parameters; a person thinks in layers, and Prometheus pays for each series. `group` is done
once per model, `summarise` once per detail. Pure, standard library only.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gradmon.record import DETAIL_COLUMNS

#: The layer of what no pattern names, and of what is too much.
OTHER = "other"

Groups = list[tuple[str, list[int]]]


@dataclass(frozen=True, slots=True)
class Grouping:
    """Layers in the order of the model: every parameter is in exactly one of them."""

    layers: Groups
    """(name of the layer, indices of its parameters). Names differ."""
    merged: int
    """Layers that went into `other` because there would have been too many."""


@dataclass(frozen=True, slots=True)
class LayerStats:
    """One layer in one step, before any clipping, unscaled. None means that it was not measured."""

    norm: float | None
    """2-norm; NaN or Inf where an element is."""
    abs_max: float | None
    """Over the finite elements, as minimum and maximum; None if there is none."""
    minimum: float | None
    maximum: float | None
    nan_count: int | None
    inf_count: int | None
    zero_ratio: float | None
    """Share of the elements that are exactly 0, over the parameters where both counts are known."""
    update_ratio: float | None
    """Mean of the parameters' update-to-weight ratios, each weighted by its number of elements where that is known: the
    ratio of a small bias says little of its layer."""


def row_names(names: Sequence[str], rows: int) -> list[str]:
    """A name for each row of a detail: parameters added to an optimizer later come behind those known at attach."""
    return [*names[:rows], *(f"added[{i}]" for i in range(rows - len(names)))]


def group(names: Sequence[str], pattern: str | None, limit: int) -> Grouping:
    """Put parameters into layers.

    Args:
        names: of all parameters, in the model's order.
        pattern: regular expression that is searched in each name; its first group (without one, or where that group
            took no part, the whole match) names the layer, and what does not match belongs to `other`. None: the path
            up to its first number (`blocks.0.mlp.2.weight` is of `blocks.0`), without a number the module that owns the
            parameter (`token.weight` is of `token`).
        limit: no more layers than this; the last are put together as `other`.

    Raises:
        ValueError: limit below 1.
        re.error: not a regular expression.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1 (got {limit}): every parameter belongs to a layer")
    found: dict[str, list[int]] = {}
    expression = None if pattern is None else re.compile(pattern)
    for index, name in enumerate(names):
        layer = _path(name) if expression is None else _matched(expression, name)
        found.setdefault(layer, []).append(index)
    if len(found) <= limit:
        return Grouping(list(found.items()), 0)
    kept = [layer for layer in found if layer != OTHER][: limit - 1]
    rest = sorted(index for layer in found.keys() - set(kept) for index in found[layer])
    merged = sum(layer != OTHER for layer in found) - len(kept)
    return Grouping([*((layer, found[layer]) for layer in kept), (OTHER, rest)], merged)


def _path(name: str) -> str:
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: place + 1])
    return ".".join(parts[:-1]) or name


def _matched(expression: re.Pattern[str], name: str) -> str:
    match = expression.search(name)
    if match is None:
        return OTHER
    first = match[1] if expression.groups else None
    return (match[0] if first is None else first) or OTHER  # an empty label is no label to Prometheus


def summarise(values: bytes, groups: Groups, elements: Sequence[int] = ()) -> list[LayerStats]:
    """What a detail says of each layer, in the order of `groups`.

    Args:
        values: as in `Detail.values`.
        groups: `Grouping.layers`; indices beyond the rows count as not measured.
        elements: number of elements per parameter, as far as known.

    Raises:
        ValueError: `values` is not made of whole rows.
    """
    width = len(DETAIL_COLUMNS)
    if len(values) % (8 * width):
        raise ValueError(f"a detail must be rows of {8 * width} bytes (got {len(values)} bytes)")
    flat = array("d", values)
    counts = [*elements, *[0] * (len(flat) // width)]
    rows = [_Row(counts[i], *flat[i * width : (i + 1) * width]) for i in range(len(flat) // width)]
    return [_summary([rows[i] for i in indices if i < len(rows)]) for _, indices in groups]


class _Row(NamedTuple):
    """A parameter: its number of elements, 0 if unknown, and DETAIL_COLUMNS in their order."""

    elements: int
    sum_of_squares: float
    nan_count: float
    inf_count: float
    zero_count: float
    abs_max: float
    minimum: float
    maximum: float
    update_ratio: float


def _summary(rows: list[_Row]) -> LayerStats:
    # A NaN count that is there tells a sum that is NaN from one that was not measured.
    squares = [r.sum_of_squares for r in rows if not (math.isnan(r.sum_of_squares) and math.isnan(r.nan_count))]
    extremes = [r for r in rows if not math.isinf(r.minimum)]  # where it is, there is no finite element
    zeros = [r for r in rows if r.elements and not math.isnan(r.zero_count)]
    ratios = [(r.update_ratio, r.elements or 1) for r in rows if math.isfinite(r.update_ratio)]
    return LayerStats(
        norm=math.sqrt(sum(squares)) if squares else None,
        abs_max=max(_measured(r.abs_max for r in extremes), default=None),
        minimum=min(_measured(r.minimum for r in extremes), default=None),
        maximum=max(_measured(r.maximum for r in extremes), default=None),
        nan_count=_total(r.nan_count for r in rows),
        inf_count=_total(r.inf_count for r in rows),
        zero_ratio=sum(r.zero_count for r in zeros) / sum(r.elements for r in zeros) if zeros else None,
        update_ratio=sum(u * n for u, n in ratios) / sum(n for _, n in ratios) if ratios else None,
    )


def _measured(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _total(counts: Iterable[float]) -> int | None:
    measured = _measured(counts)
    return int(sum(measured)) if measured else None
