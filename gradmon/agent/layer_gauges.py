"""The newest values per layer of one journal: what a run's `metrics` settings allow of them, for the exporter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gradmon.config import MetricsConfig
from gradmon.journal import JournalView
from gradmon.layers import Groups, group, row_names, summarise
from gradmon.record import DETAIL_COLUMNS, Detail, finite

#: Metrics labelled by layer, and the value of a layer each shows: the last finite one, as all gauges do ...
LAYER_GAUGES = {
    "gradmon_layer_grad_norm": "norm",
    "gradmon_layer_grad_abs_max": "abs_max",
    "gradmon_layer_grad_zero_ratio": "zero_ratio",
    "gradmon_layer_update_ratio": "update_ratio",
    "gradmon_layer_nonfinite_elements": "nonfinite",  # ... but this one that of the newest detail, or none
}


class LayerGauges:
    """Groups the parameters once, and again only where parameters were added to an optimizer."""

    def __init__(self, view: JournalView) -> None:
        self._names = view.parameter_names
        self._elements = view.elements
        self._settings = _settings(view.config)
        self._rows = -1
        self._groups: Groups = []
        self.values: dict[str, dict[str, float]] = {}
        """Layer -> value by its name in LAYER_GAUGES; layers in the order of the model."""
        self.dropped = 0
        """Series that the budget left out."""

    def feed(self, detail: Detail) -> None:
        """Take in a newer detail.

        Raises:
            ValueError: it is not made of whole rows.
            re.error: the pattern in the journal's config is none.
        """
        rows = len(detail.values) // (8 * len(DETAIL_COLUMNS))
        if rows != self._rows:
            self._group(rows)
        for (layer, _), stats in zip(self._groups, summarise(detail.values, self._groups, self._elements), strict=True):
            values = self.values[layer]
            for name in ("norm", "abs_max", "zero_ratio", "update_ratio"):
                value = finite(getattr(stats, name))
                if value is not None:
                    values[name] = value
            counts = [count for count in (stats.nan_count, stats.inf_count) if count is not None]
            values.pop("nonfinite", None)
            if counts:
                values["nonfinite"] = float(sum(counts))

    def _group(self, rows: int) -> None:
        names = row_names(self._names, rows)
        limit = max(1, self._settings.series_budget // len(LAYER_GAUGES))
        left_out = 0
        if self._settings.level == "core":
            groups: Groups = []
        elif self._settings.level == "layers":
            grouping = group(names, self._settings.layers, limit)
            groups, left_out = grouping.layers, grouping.merged
        else:
            places: dict[str, list[int]] = {}  # a name that two parameters share would be one label set twice
            for place, name in enumerate(names):
                places.setdefault(name, []).append(place)
            # In the model's order, not by size: else series would come and go.
            groups, left_out = list(places.items())[:limit], max(0, len(places) - limit)
        self._groups, self._rows = groups, rows
        self.values = {layer: self.values.get(layer, {}) for layer, _ in groups}
        self.dropped = left_out * len(LAYER_GAUGES)


def _settings(config: Mapping[str, Any]) -> MetricsConfig:
    """From a journal, whose writer may have known fewer or more settings than this agent."""
    known = {field.name for field in dataclasses.fields(MetricsConfig)}
    return MetricsConfig(**{name: value for name, value in config.get("metrics", {}).items() if name in known})
