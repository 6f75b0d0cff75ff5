"""Details of a few steps -> how each layer and each parameter stands. Pure."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from gradmon.layers import group, row_names, summarise
from gradmon.record import DETAIL_COLUMNS, Detail

_WIDTH = len(DETAIL_COLUMNS)
_MOST_LAYERS = 48


@dataclass(frozen=True, slots=True)
class Worst:
    """The detail with most NaN and infinite elements; the first one of several."""

    nonfinite_elements: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True)
class ParameterStory:
    """One parameter over the details that were kept. Gradients before clipping, unscaled; None: not measured."""

    name: str
    elements: int
    """0 if unknown."""
    norm: float | None
    """2-norm in the newest detail in which it is finite."""
    largest_norm: float | None
    """Largest finite one."""
    norm_ratio: float | None
    """Its share of the sum of squares over all parameters, in the newest finite detail; from 0 to 1."""
    nonfinite_elements: int
    """NaN and infinite elements in the newest detail."""
    worst: Worst
    zero_ratio: float | None
    """Share of its elements whose gradient is exactly 0, newest measured."""
    update_ratio: float | None
    """Norm of the update over the norm of the weights, newest measured."""
    has_gradient: bool
    """False if it never had one."""


@dataclass(frozen=True, slots=True)
class LayerStory:
    """One layer: the same, newest measured."""

    name: str
    norm: float | None
    zero_ratio: float | None
    update_ratio: float | None
    nonfinite_elements: int
    worst: Worst


def parameter_stories(
    names: Sequence[str], elements: Sequence[int], details: Sequence[Detail]
) -> tuple[ParameterStory, ...]:
    """How each parameter stands, in the order of the model; () without details.

    Args:
        names: of the parameters, as in the journal.
        elements: how many elements each has; may be empty.
        details: of the global gradients, oldest first.
    """
    tables = [_table(detail) for detail in details]
    if not tables:
        return ()
    count = max(len(table) for table in tables)
    sizes = [*elements, *[0] * count]
    totals = [sum(row[0] for row in table if math.isfinite(row[0])) for table in tables]
    told = [(detail.step, table, total) for detail, table, total in zip(details, tables, totals, strict=True)]
    return tuple(
        _parameter(name, sizes[i], [_Seen(step, t[i], total) for step, t, total in told if i < len(t)])
        for i, name in enumerate(row_names(names, count))
    )


def layer_stories(
    names: Sequence[str], elements: Sequence[int], details: Sequence[Detail], pattern: str | None
) -> tuple[LayerStory, ...]:
    """The same per layer; `pattern` as in the setting metrics.layers."""
    if not details:
        return ()
    count = max(len(detail.values) // (8 * _WIDTH) for detail in details)
    groups = group(row_names(names, count), pattern, _MOST_LAYERS).layers
    steps = [summarise(detail.values, groups, elements) for detail in details]
    stories = []
    for i, (name, _) in enumerate(groups):
        seen = [step[i] for step in steps]
        broken = [int(_sum(one.nan_count or 0, one.inf_count or 0)) for one in seen]
        stories.append(
            LayerStory(
                name,
                _newest([one.norm for one in seen]),
                _newest([one.zero_ratio for one in seen]),
                _newest([one.update_ratio for one in seen]),
                broken[-1],
                _worst([detail.step for detail in details], broken),
            )
        )
    return tuple(stories)


def nonfinite_parameters(names: Sequence[str], detail: Detail) -> list[tuple[str, int]]:
    """(name, non-finite elements) of the parameters that have any, most first."""
    table = _table(detail)
    found = []
    for name, row in zip(row_names(names, len(table)), table, strict=True):
        _, nan_count, inf_count, *_ = row
        count = sum(int(c) for c in (nan_count, inf_count) if not math.isnan(c))
        if count:
            found.append((name, count))
    return sorted(found, key=lambda pair: -pair[1])


def _table(detail: Detail) -> list[tuple[float, ...]]:
    whole = len(detail.values) // (8 * _WIDTH) * 8 * _WIDTH  # of one that is cut off, what is there
    flat = array("d", detail.values[:whole])
    return [tuple(flat[i : i + _WIDTH]) for i in range(0, len(flat), _WIDTH)]


@dataclass(frozen=True, slots=True)
class _Seen:
    """One parameter in one detail."""

    step: int
    row: tuple[float, ...]
    total: float
    """Sum of squares over all parameters that were finite."""


def _parameter(name: str, elements: int, seen: list[_Seen]) -> ParameterStory:
    finite = [one for one in seen if math.isfinite(one.row[0])]
    norms = [math.sqrt(one.row[0]) for one in finite]
    zeros = [one.row[3] / elements for one in seen if elements and not math.isnan(one.row[3])]
    broken = [int(_sum(one.row[1], one.row[2])) for one in seen]
    return ParameterStory(
        name=name,
        elements=elements,
        norm=_newest(norms),
        largest_norm=max(norms, default=None),
        norm_ratio=_newest([one.row[0] / one.total for one in finite if one.total > 0]),
        nonfinite_elements=broken[-1] if broken else 0,
        worst=_worst([one.step for one in seen], broken),
        zero_ratio=_newest(zeros),
        update_ratio=_newest([one.row[7] for one in seen]),
        has_gradient=any(not math.isnan(one.row[1]) for one in seen),
    )


def _worst(steps: Sequence[int], broken: Sequence[int]) -> Worst:
    most = max(broken, default=0)
    return Worst(most, steps[broken.index(most)]) if most else Worst()


def _sum(*counts: float) -> float:
    return sum(count for count in counts if not math.isnan(count))


def _newest(values: Sequence[float | None]) -> float | None:
    return next((v for v in reversed(values) if v is not None and math.isfinite(v)), None)
