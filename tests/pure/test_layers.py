from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradmon.layers import OTHER, Grouping, LayerStats, group, row_names, summarise
from gradmon.record import DETAIL_COLUMNS

COLUMN = {name: place for place, name in enumerate(DETAIL_COLUMNS)}


class TestGroup:
    @pytest.mark.parametrize(
        ("name", "layer"),
        [
            ("blocks.0.mlp.2.weight", "blocks.0"),
            ("transformer.h.11.attn.c_attn.weight", "transformer.h.11"),
            ("token.weight", "token"),
            ("encoder.final.norm.bias", "encoder.final.norm"),
            ("weight", "weight"),
            ("0.weight", "0"),
            ("layer4.conv1.weight", "layer4.conv1"),
            ("heads.3", "heads.3"),
            ("added[0]", "added[0]"),
        ],
    )
    def test_the_built_in_rule(self, name: str, layer: str) -> None:
        assert group([name], None, 10) == Grouping([(layer, [0])], 0)

    def test_layers_keep_the_models_order_and_gather_what_is_scattered(self) -> None:
        names = ["token.weight", "b.1.w", "b.0.w", "token.bias", "b.1.v"]
        assert group(names, None, 10).layers == [("token", [0, 3]), ("b.1", [1, 4]), ("b.0", [2])]

    @pytest.mark.parametrize(
        ("pattern", "layers"),
        [
            (r"(attn|mlp)", [("attn", [0, 2]), ("mlp", [1, 3]), (OTHER, [4])]),
            (r"h\.\d+", [("h.0", [0, 1]), ("h.1", [2, 3]), (OTHER, [4])]),
            (r"h\.(?:\d+)\.(\w+)|token", [("attn", [0, 2]), ("mlp", [1, 3]), ("token", [4])]),
            (r"x?", [(OTHER, [0, 1, 2, 3, 4])]),
            (r"(\w+)$", [("w", [0, 1, 2, 3, 4])]),
        ],
        ids=["group", "whole match", "group took no part", "empty match", "end"],
    )
    def test_a_pattern(self, pattern: str, layers: list[tuple[str, list[int]]]) -> None:
        names = ["h.0.attn.w", "h.0.mlp.w", "h.1.attn.w", "h.1.mlp.w", "token.w"]
        assert group(names, pattern, 10).layers == layers

    def test_too_many_layers_share_one(self) -> None:
        names = [f"h.{i}.w" for i in range(6)]
        assert group(names, None, 6).merged == 0
        assert group(names, None, 4) == Grouping([("h.0", [0]), ("h.1", [1]), ("h.2", [2]), (OTHER, [3, 4, 5])], 3)
        assert group(names, None, 1) == Grouping([(OTHER, [0, 1, 2, 3, 4, 5])], 6)

    def test_what_matches_nothing_joins_what_is_too_much(self) -> None:
        names = ["x", "h.0", "h.1", "h.2"]
        assert group(names, r"h\.\d", 3) == Grouping([("h.0", [1]), ("h.1", [2]), (OTHER, [0, 3])], 1)

    @given(
        st.lists(st.from_regex(r"([a-c]|[0-3]|other)(\.([a-c]|[0-3]|other)){0,3}", fullmatch=True), max_size=40),
        st.sampled_from([None, r"(\w)\.", r"\d", "a|(b)", "", "other"]),
        st.integers(1, 12),
    )
    def test_every_parameter_is_in_exactly_one_layer(self, names: list[str], pattern: str | None, limit: int) -> None:
        free = group(names, pattern, 10_000)
        tight = group(names, pattern, limit)
        for grouping in (free, tight):
            assert sorted(i for _, indices in grouping.layers for i in indices) == list(range(len(names)))
            assert len({layer for layer, _ in grouping.layers}) == len(grouping.layers)
            assert all(indices == sorted(indices) and indices for _, indices in grouping.layers)
        assert len(tight.layers) <= limit
        assert free.merged == 0
        assert (tight.merged > 0) == (len(free.layers) > limit)
        own = {layer for layer, _ in free.layers} - {OTHER}
        assert len(own) - len({layer for layer, _ in tight.layers} - {OTHER}) == tight.merged
        kept = [(layer, indices) for layer, indices in tight.layers if layer != OTHER]
        assert kept == [pair for pair in free.layers if pair[0] != OTHER][: len(kept)], "the model's first, unchanged"

    def test_mistakes(self) -> None:
        with pytest.raises(ValueError, match=r"limit must be at least 1 \(got 0\)"):
            group(["a"], None, 0)
        with pytest.raises(re.error):
            group(["a"], "(", 5)


def test_rows_beyond_the_known_names() -> None:
    assert row_names(["a", "b"], 4) == ["a", "b", "added[0]", "added[1]"]
    assert row_names(["a", "b"], 1) == ["a"]


def statistics_of(gradient: np.ndarray, update_ratio: float = np.nan) -> list[float]:
    """One row of a detail, as the trainer measures it."""
    fine = gradient[np.isfinite(gradient)]
    some = fine.size > 0
    return [
        float(np.sum(gradient * gradient)), float(np.isnan(gradient).sum()), float(np.isinf(gradient).sum()),
        float((gradient == 0).sum()), float(np.abs(fine).max()) if some else 0.0,
        float(fine.min()) if some else np.inf, float(fine.max()) if some else -np.inf, update_ratio,
    ]  # fmt: skip


def packed(rows: list[list[float]]) -> bytes:
    return np.array(rows, dtype=np.float64).reshape(-1, len(DETAIL_COLUMNS)).tobytes()


UNMEASURED = [np.nan] * len(DETAIL_COLUMNS)
elements = st.one_of(
    st.floats(-1e6, 1e6, width=32), st.just(0.0), st.sampled_from([float("nan"), float("inf"), float("-inf")])
)
gradients = st.lists(elements, min_size=1, max_size=6)


class TestSummarise:
    def test_row_is_as_the_columns_say(self) -> None:
        row = statistics_of(np.array([3.0, 0.0, -4.0]), 0.5)
        assert dict(zip(DETAIL_COLUMNS, row, strict=True)) == {
            "sum_of_squares": 25, "nan_count": 0, "inf_count": 0, "zero_count": 1, "abs_max": 4, "minimum": -4,
            "maximum": 3, "update_ratio": 0.5,
        }  # fmt: skip

    def test_a_layer_is_what_its_gradients_are_together(self) -> None:
        rng = np.random.default_rng(0)
        parts = [rng.normal(size=n) * (rng.random(n) > 0.4) for n in (7, 3, 30, 5)]
        values = packed([statistics_of(part) for part in parts])
        layers = [("a", [0, 2]), ("b", [1, 3])]
        for stats, (_, indices) in zip(summarise(values, layers, [7, 3, 30, 5]), layers, strict=True):
            whole = np.concatenate([parts[i] for i in indices])
            assert stats.norm == pytest.approx(np.linalg.norm(whole))
            assert (stats.abs_max, stats.minimum, stats.maximum) == (abs(whole).max(), whole.min(), whole.max())
            assert 0 < (whole == 0).mean() < 1
            assert stats.zero_ratio == pytest.approx((whole == 0).mean())
            assert (stats.nan_count, stats.inf_count, stats.update_ratio) == (0, 0, None)

    @given(st.lists(st.one_of(st.none(), gradients), min_size=1, max_size=5))
    def test_broken_and_missing_gradients(self, parts: list[list[float] | None]) -> None:
        """None is a parameter without a gradient."""
        with np.errstate(all="ignore"):
            values = packed([UNMEASURED if part is None else statistics_of(np.array(part)) for part in parts])
            (stats,) = summarise(values, [("all", list(range(len(parts))))], [len(part or [1] * 9) for part in parts])
            whole = np.array([x for part in parts for x in part or []])
            if not whole.size:
                assert stats == LayerStats(*[None] * 8)
                return
            fine = whole[np.isfinite(whole)]
            assert (stats.nan_count, stats.inf_count) == (np.isnan(whole).sum(), np.isinf(whole).sum())
            assert stats.norm is not None
            np.testing.assert_allclose(stats.norm, np.sqrt(np.sum(whole * whole)), rtol=1e-9)
            extremes = (abs(fine).max(), fine.min(), fine.max()) if fine.size else (None, None, None)
            assert (stats.abs_max, stats.minimum, stats.maximum) == extremes
            assert stats.zero_ratio == pytest.approx((whole == 0).sum() / whole.size)

    def test_columns_that_were_not_measured_are_absent_and_the_others_are_not(self) -> None:
        first, second = statistics_of(np.array([3.0, 0.0]), 0.25), statistics_of(np.array([4.0, 0.0]))
        first[COLUMN["zero_count"]] = np.nan
        for name in ("abs_max", "minimum", "maximum", "nan_count", "inf_count"):
            second[COLUMN[name]] = np.nan
        both, alone = summarise(packed([first, second]), [("both", [0, 1]), ("second", [1])], [2, 2])
        assert both == LayerStats(5.0, 3.0, 0.0, 3.0, 0, 0, 0.5, 0.25)
        assert alone == LayerStats(4.0, None, None, None, None, None, 0.5, None)

    def test_a_sum_that_is_nan_was_measured_where_the_nan_were_counted(self) -> None:
        (stats,) = summarise(packed([statistics_of(np.array([1.0, np.nan])), UNMEASURED]), [("x", [0, 1])])
        assert stats.norm is not None and np.isnan(stats.norm)
        assert (stats.nan_count, stats.abs_max) == (1, 1.0)

    def test_without_element_counts_there_is_no_zero_ratio(self) -> None:
        values = packed([statistics_of(np.zeros(4)), statistics_of(np.array([1.0, 0.0]))])
        layers = [("x", [0, 1])]
        assert summarise(values, layers)[0].zero_ratio is None
        assert summarise(values, layers, [4])[0].zero_ratio == 1.0, "of those that are known"
        assert summarise(values, layers, [4, 2])[0].zero_ratio == pytest.approx(5 / 6)

    def test_the_update_ratio_is_weighted_by_elements(self) -> None:
        values = packed(
            [statistics_of(np.ones(3), 0.5), statistics_of(np.ones(1), 0.1), statistics_of(np.ones(2), np.inf)]
        )
        layers = [("x", [0, 1, 2])]
        assert summarise(values, layers, [3, 1, 2])[0].update_ratio == pytest.approx((3 * 0.5 + 0.1) / 4)
        assert summarise(values, layers)[0].update_ratio == pytest.approx(0.3)

    def test_indices_beyond_the_rows_were_not_measured(self) -> None:
        one, two = summarise(packed([statistics_of(np.array([3.0, 4.0]))]), [("x", [0, 1]), ("y", [2])])
        assert one.norm == 5.0
        assert two == LayerStats(*[None] * 8)

    def test_half_a_row_is_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"rows of 64 bytes \(got 72 bytes\)"):
            summarise(b"\0" * 72, [("x", [0])])
