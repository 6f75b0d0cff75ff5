"""The picture of the autograd graph: drawn for real, the culprit in colour, and never too large to read."""

from __future__ import annotations

import math
import re
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zoo_replay import Distance, LogOfSoftmax, incident, log_of_zero, sqrt_at_zero

from gradmon.diagnose import graph
from gradmon.diagnose.bundle import load_bundle
from gradmon.diagnose.graph import GraphError, draw
from gradmon.diagnose.replay import Replay, replay

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("torchviz", reason="torchviz is not installed: left out")


def size_of(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def nodes_of(svg: Path) -> list[str]:
    return re.findall(r'<g id="node\d+" class="node">.*?</g>', svg.read_text(), re.S)


def answer_of(folder: Path) -> Replay:
    torch.manual_seed(0)
    return replay(load_bundle(sqrt_at_zero(folder, Distance())), Distance())


class Unit(nn.Module):
    """Divides what it is given, which needs no gradient, by its length; a layer comes before it and one behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        shift = self.first(torch.ones(1, 4))
        unit = x / x.norm(dim=1, keepdim=True)
        return self.second(unit + shift).square().mean()


def test_a_culprit_without_a_gradient_colours_no_other_node(graphviz: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    answer = replay(load_bundle(incident(tmp_path, Unit(), lambda m: m(torch.zeros(2, 4)))), Unit())
    assert answer.blame is not None
    assert answer.blame.culprit is not None
    assert answer.blame.culprit.name == "div"
    svg, _ = draw(answer, tmp_path / "drawn")
    assert not [node for node in nodes_of(svg) if graph._CULPRIT in node]
    assert "div is not in this graph" in svg.read_text()


def test_the_culprit_and_the_way_to_it_are_in_colour(graphviz: str, tmp_path: Path) -> None:
    answer = answer_of(tmp_path)
    svg, png = draw(answer, tmp_path / "drawn")
    assert svg.name == "rank-00000-step-0000007-graph.svg"
    nodes = nodes_of(svg)
    culprits = [node for node in nodes if graph._CULPRIT in node]
    assert len(culprits) == 1
    assert "SqrtBackward0" in culprits[0]
    assert ".sqrt().mean()" in culprits[0].replace("&#45;", "-")
    way = [node for node in nodes if graph._PATH in node]
    assert any("MeanBackward0" in node for node in way), "from the loss"
    assert any("encoder.weight" in node for node in way), "to the parameter that broke"
    assert len(way) < len(nodes) - 1, "the rest is not coloured"
    assert f'stroke="{graph._CULPRIT}"' in svg.read_text(), "arrows too"
    width, height = size_of(png)
    assert 200 < width < 4000
    assert 200 < height < 4000


def test_a_file_may_be_named(graphviz: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    answer = replay(load_bundle(log_of_zero(tmp_path, LogOfSoftmax())), LogOfSoftmax())
    assert draw(answer, tmp_path / "here" / "why.png") == [tmp_path / "here" / "why.svg", tmp_path / "here" / "why.png"]


class Deep(nn.Module):
    """More than a thousand nodes, of which one breaks in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(300))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + layer(x).tanh() * 0.01
            if i == 150:
                x = (x.abs() * keep).sqrt() + x
        return x.mean()


def test_a_large_graph_is_cut_down_to_the_neighbourhood(graphviz: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    keep = torch.tensor([[1.0, 0.0]])
    path = incident(tmp_path, Deep(), lambda m: m(torch.randn(3, 2), keep))
    answer = replay(load_bundle(path), Deep())
    assert answer.blame is not None
    assert answer.blame.finding.message.startswith("sqrt backward")
    everything = graph._Graph(answer)
    assert len(everything._nodes) > 2 * graph.MOST_NODES
    svg, png = draw(answer, tmp_path)
    nodes = nodes_of(svg)
    assert 40 < len(nodes) < graph.MOST_NODES
    assert sum(graph._CULPRIT in node for node in nodes) == 1
    assert f"{len(everything._kept)} of {len(everything._nodes)} nodes" in svg.read_text()
    assert max(size_of(png)) < 32768, "the largest that cairo draws"


def test_what_is_missing_is_told_with_its_cure(graphviz: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = answer_of(tmp_path)
    with monkeypatch.context() as without:
        without.setenv("PATH", "")
        assert shutil.which("dot") is None
        with pytest.raises(GraphError, match="apt-get install graphviz"):
            draw(answer, tmp_path)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torchviz", None)
        with pytest.raises(GraphError, match="pip install torchviz"):
            draw(answer, tmp_path)
    (file := tmp_path / "file").write_text("")
    with pytest.raises(GraphError, match="can't be written"):
        draw(answer, file / "below")
    answer.root = torch.tensor(math.nan)
    with pytest.raises(GraphError, match="no graph to draw"):
        draw(answer, tmp_path)
