"""The dashboards, as code: `BOARDS` in the order a person meets them, `panel_queries` for who runs their queries."""

from __future__ import annotations

from boards import fleet, gpu, layers, ranks, run
from boards.frame import Board, build
from boards.queries import PanelQuery, annotation_queries, panel_queries, resolve

BOARDS: dict[str, Board] = {
    board.name: board for board in (fleet.BOARD, run.BOARD, ranks.BOARD, layers.BOARD, gpu.BOARD)
}

__all__ = ["BOARDS", "Board", "PanelQuery", "annotation_queries", "build", "panel_queries", "resolve"]
