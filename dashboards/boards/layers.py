"""Layers: where in the model it happens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from boards.ask import BY_RUN
from boards.frame import ONE_RUN, RUN, Board, of_run, peak
from boards.parts import (
    BAD,
    CALM,
    GOOD,
    NOTE,
    REST,
    WARN,
    Column,
    Line,
    Query,
    bars,
    grid,
    heat,
    history,
    lines,
    number,
)

_BY_LAYER = "by (cluster, run, layer)"
_KEYS = "on (cluster, run, layer)"
#: Rows of a heatmap.
_MOST = 80


def _layer(metric: str) -> str:
    return f"max {_BY_LAYER} ({metric}{{{RUN}}} and on (job, instance, run) gradmon_world_size{{{RUN}}})"


def _in_order(expr: str) -> str:
    """The first number in a layer's name with two digits, so that h.2 stands before h.10."""
    return f'label_replace({expr}, "layer", "${{1}}0$2$3", "layer", "(|.*?[^0-9])([0-9])(|[^0-9].*)")'


def _largest(metric: str) -> str:
    """A metric by time, of the layers where it was largest: chosen once for the whole range, so that no more appear."""
    chosen = f"topk({_MOST}, max {_BY_LAYER} (max_over_time({metric}{{{RUN}}}[$__range] @ end())))"
    return f"max {_BY_LAYER} {peak(metric)} and {_KEYS} {chosen}"


def _now() -> Sequence[Any]:
    nan = f"count(max {_BY_LAYER} (gradmon_layer_nonfinite_elements{{{RUN}}}) > 0) or vector(0)"
    dead = f"count(max {_BY_LAYER} (gradmon_layer_grad_zero_ratio{{{RUN}}}) > 0.9) or vector(0)"
    spread = f"max({_layer('gradmon_layer_grad_norm')}) / quantile(0.5, {_layer('gradmon_layer_grad_norm')})"
    return (
        number("Layers measured", "Layers with series of their own; gradmon puts parameters together by layer.", "none",
            Query(f"count({_layer('gradmon_layer_grad_norm')}) or vector(0)"), steps=((None, NOTE),), width=4),
        number("Series left out", "Series per layer that metrics.series_budget left out; 0 when all are there.", "none",
            Query(f"max({of_run('gradmon_series_dropped')})"), steps=((None, GOOD), (1, WARN)), width=4,
            runbook="GradmonUnwell"),
        number("Layers with NaN or Inf", "Layers whose gradients held NaN or Inf in the newest step with full "
            "statistics.", "none", Query(nan), steps=((None, GOOD), (1, BAD)), width=4,
            runbook="GradmonNonfiniteGradients"),
        number("Layers mostly 0", "Layers of whose gradient elements more than 90 % are exactly 0. Usual for "
            "embeddings; elsewhere the layer hardly learns.", "none", Query(dead), steps=((None, NOTE),), width=4),
        number("Largest layer over median", "Norm of the layer with the largest gradients over the median layer's.",
            "none", Query(spread), decimals=1, steps=((None, NOTE),), width=4),
        number("Gradient norm", "Norm of all layers together, before clipping.", "none",
            Query(f"max({of_run('gradmon_grad_norm')})"), decimals=2, steps=((None, NOTE),), width=4,
            runbook="GradmonGradientExplosion"),
    )  # fmt: skip


def _norms() -> Sequence[Any]:
    top = f"max {_BY_LAYER} (max_over_time(gradmon_layer_grad_norm{{{RUN}}}[$__range]))"
    middle = f"max {_BY_LAYER} (quantile_over_time(0.5, gradmon_layer_grad_norm{{{RUN}}}[$__range]))"
    return (
        heat("Gradient norm, layer by time", (
            "The gradient norm of each layer as a power of ten (-1 is 0.1, 0 is 1, 1 is 10): bright is large. An "
            "explosion begins in one layer and spreads to the others. Up to 80 layers, those with the largest norms; "
            "the first number of a name has two digits so that they stand in order."), "none",
            Query(_in_order(f"log10(({_largest('gradmon_layer_grad_norm')}) > 0)"), "{{layer}}"), width=17,
            height=13, decimals=2),
        bars("Top movers at their peak", "The largest norm of a layer in the time shown over its own median: where it "
            "exploded.", "none", Query(f"sort_desc(topk(15, {top} / ({middle} > 0)))", "{{layer}}"), width=7,
            height=13, decimals=1, steps=((None, WARN),), runbook="GradmonGradientExplosion"),
    )  # fmt: skip


def _health() -> Sequence[Any]:
    nan = "gradmon_layer_nonfinite_elements"
    broken = f"topk(30, max {_BY_LAYER} (max_over_time({nan}{{{RUN}}}[$__range] @ end())) > 0)"
    update = _layer("gradmon_layer_update_ratio")
    top = f"topk({{}}, max {_BY_LAYER} (max_over_time({{}}{{{{{RUN}}}}}[$__range] @ end())))"
    zero, largest = "gradmon_layer_grad_zero_ratio", "gradmon_layer_grad_abs_max"
    return (
        history("NaN and Inf by layer", "Layers whose gradients held NaN or Inf, in steps with full statistics: where "
            "it broke. Up to 30 layers; empty is good.", "none",
            Query(f"max {_BY_LAYER} {peak(nan)} and {_KEYS} {broken}", "{{layer}}"), ((None, "#22252b"), (1, BAD)),
            width=12, runbook="GradmonNonfiniteGradients"),
        heat("Update to weight ratio, layer by time", (
            "How far one step moves the weights of a layer, relative to their size, as a power of ten: -3 (0.001) is "
            "usual; -2 is unstable; -5 means the layer hardly learns."), "none",
            Query(_in_order(f"log10(({_largest('gradmon_layer_update_ratio')}) > 0)"), "{{layer}}"), width=12,
            height=8, decimals=2, scheme="Viridis", axis=""),
        lines("Update to weight ratio over the layers", "Highest, median and lowest layer. About 0.001 is usual.",
            "none", Query(f"max({update})", "highest"), Query(f"quantile(0.5, {update})", "median"),
            Query(f"min({update})", "lowest"), log=True, fill=0,
            look={"highest": Line(WARN, width=1), "median": Line(NOTE), "lowest": Line(REST, width=1)}),
        lines("Largest gradient elements", "Largest absolute value in a layer's gradients, the six layers with the "
            "largest.", "none", Query(f"{_layer(largest)} and {_KEYS} {top.format(6, largest)}", "{{layer}}"),
            log=True, fill=0),
        lines("Gradients that are exactly 0", "Share of 0 in a layer's gradients, the six layers with most. Near "
            "100 % is usual for embeddings only.", "percentunit",
            Query(f"{_layer(zero)} and {_KEYS} {top.format(6, zero)}", "{{layer}}"), lowest=0, highest=1, fill=0),
    )  # fmt: skip


def _movers() -> Any:
    norm = f"max {_BY_LAYER} (gradmon_layer_grad_norm{{{RUN}}})"
    usual = f"max {_BY_LAYER} (avg_over_time(gradmon_layer_grad_norm{{{RUN}}}[$__range]))"
    return bars(
        "Top movers now",
        "Layers whose norm is now largest against their own mean in the time shown; 1 is no change.",
        "none",
        Query(f"sort_desc(topk(12, {norm} / ({usual} > 0)))", "{{layer}}"),
        width=7,
        height=10,
        decimals=2,
        steps=((None, NOTE),),
    )


def _table() -> Any:
    chosen = f"topk(60, max {_BY_LAYER} (gradmon_layer_grad_norm{{{RUN}}}))"

    def of(metric: str) -> str:
        return f"max {_BY_LAYER} ({metric}{{{RUN}}}) and {_KEYS} {chosen}"

    share = (
        f"(max {_BY_LAYER} (gradmon_layer_grad_norm{{{RUN}}}) / ignoring (layer) group_left () "
        f"(sum {BY_RUN} (max {_BY_LAYER} (gradmon_layer_grad_norm{{{RUN}}} ^ 2)) ^ 0.5)) ^ 2 and {_KEYS} {chosen}"
    )
    return grid(
        "Layers, the largest gradients first",
        "The newest statistics of up to 60 layers. Share: of the squared norm of all gradients together.",
        Column("Layer", label="layer"),
        Column("Norm", of("gradmon_layer_grad_norm"), unit="none", decimals=4, width=95),
        Column("Share", share, unit="percentunit", decimals=1, gauge=True, top=1, width=170, steps=((None, CALM),)),
        Column("Largest element", of("gradmon_layer_grad_abs_max"), unit="none", decimals=4, width=125),
        Column("NaN and Inf", of("gradmon_layer_nonfinite_elements"), unit="short", decimals=0,
            steps=((None, GOOD), (1, BAD)), width=100),
        Column("Exactly 0", of("gradmon_layer_grad_zero_ratio"), unit="percentunit", decimals=1, width=95),
        Column("Update / weights", of("gradmon_layer_update_ratio"), unit="sci", decimals=2, width=125),
        sort="Norm",
        width=17,
        height=10,
    )  # fmt: skip


def _rows() -> Sequence[tuple[str, Sequence[Any]]]:
    return (
        ("Now", _now()),
        ("Gradient norms", _norms()),
        ("Health of the layers", (*_health(), _table(), _movers())),
    )


BOARD = Board(
    "layers",
    "gradmon / Layers",
    "The layers of one run's model: where gradients explode, hold NaN, vanish, or move the weights too far.",
    (ONE_RUN,),
    _rows,
)
