"""The autograd graph of a replay, drawn with torchviz: the way to the culprit in colour."""

from __future__ import annotations

import importlib
import warnings
from collections import deque
from pathlib import Path
from typing import Any

from gradmon.diagnose.operations import Operation
from gradmon.diagnose.replay import Replay

#: A graph of more nodes is cut down to the neighbourhood of the culprit's path: nobody can read it otherwise.
MOST_NODES = 400
#: So many nodes of the path are shown then on either side of the culprit, and so many around it.
_WINDOW = 20
_NEIGHBOURS = 60
_PATH, _CULPRIT = "#f6b26b", "#e06666"


class GraphError(ValueError):
    """The graph can't be drawn; the message says what is missing."""


def draw(replay: Replay, path: Path) -> list[Path]:
    """Draw it as SVG and PNG.

    Args:
        replay: with its autograd graph.
        path: a file (its suffix is replaced), or a directory, which is made if need be.

    Returns:
        The two files.

    Raises:
        GraphError: torchviz or graphviz is not installed, or the place can't be written.
    """
    try:
        graphviz: Any = importlib.import_module("graphviz")
        with warnings.catch_warnings():  # torchviz compares versions with what Python has deprecated
            warnings.simplefilter("ignore")
            torchviz: Any = importlib.import_module("torchviz")
    except ImportError as error:
        cure = "pip install setuptools" if error.name == "distutils" else "pip install torchviz"
        raise GraphError(f"--graph needs {error.name}: {cure}") from None
    graph = _Graph(replay)
    if not graph.roots:
        raise GraphError("--graph: the loss depends on no parameter, there is no graph to draw")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dot = torchviz.make_dot(graph.shown(), params={})
    graph.colour(dot)
    stem = path / f"rank-{replay.bundle.identity.rank:05d}-step-{replay.bundle.step:07d}-graph"
    stem = path.with_suffix("") if path.suffix in (".svg", ".png") else stem
    files = []
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for kind in ("svg", "png"):
            file = stem.with_suffix(f".{kind}")
            file.write_bytes(dot.pipe(format=kind))
            files.append(file)
    except graphviz.ExecutableNotFound:
        raise GraphError("--graph needs the program dot of graphviz: apt-get install graphviz") from None
    except OSError as error:
        raise GraphError(f"--graph {path} can't be written: {error.strerror or error}") from None
    return files


class _Graph:
    """Which nodes of the autograd graph are shown, and what is written on them."""

    def __init__(self, replay: Replay) -> None:
        root = replay.root.grad_fn
        self.roots = [] if root is None else [root]
        self._names = {id(p): name for name, p in replay.model.named_parameters()}
        #: All nodes, from the loss down; holding them keeps their ids.
        self._nodes: list[Any] = []
        self._users: dict[int, list[Any]] = {}
        self._walk()
        self._culprit = None if replay.blame is None else replay.blame.culprit
        there = self._culprit is not None and any(_is_node_of(self._culprit, node) for node in self._nodes)
        culprit = self._culprit if there else None
        self._culprit_sequence = -1 if culprit is None else culprit.sequence
        self._told = {} if culprit is None else {culprit.sequence: _told(culprit)}
        self._path = self._path_of(replay)
        self._kept = self._kept_nodes()
        self._shown: dict[int, Any] = {}
        self._outputs: tuple[_Output, ...] = ()

    def shown(self) -> Any:
        """What torchviz draws: stand-ins for the nodes that are kept, with the names they are to have."""
        for node in self._nodes:
            if id(node) in self._kept:
                self._shown[id(node)] = _stand_in(self._label(node))
        for node in self._nodes:
            if id(node) not in self._shown:
                continue
            stand_in = self._shown[id(node)]
            below = [(self._shown.get(id(n)), 0) for n, _ in node.next_functions if n is not None]
            stand_in.next_functions = tuple((n, i) for n, i in below if n is not None)
        # A neighbourhood may have several tops, below what is not shown.
        tops = [n for n in self._shown if not any(id(u) in self._shown for u in self._users.get(n, []))]
        self._outputs = tuple(_Output(self._shown[n]) for n in tops)
        return self._outputs

    def colour(self, dot: Any) -> None:
        """Mark the path; graphviz takes the last that is said of a node."""
        dot.attr(rankdir="TB", dpi="110", label=self._caption(), labelloc="t", fontname="sans-serif", fontsize="14")
        on_path = {str(id(self._shown[id(n)])): n for n in self._path if id(n) in self._shown}
        for name, node in on_path.items():
            culprit = _sequence(node) == self._culprit_sequence
            dot.node(name, fillcolor=_CULPRIT if culprit else _PATH, penwidth="3" if culprit else "1.5")
        for output in self._outputs:
            label = "loss" if output.grad_fn is self._shown.get(id(self.roots[0])) else "..."
            dot.node(str(id(output)), label=label)
        for i, line in enumerate(dot.body):
            ends = line.split("[")[0].strip().split(" -> ")
            if len(ends) == 2 and ends[0] in on_path and ends[1].strip() in on_path:
                dot.body[i] = f"\t{ends[0]} -> {ends[1].strip()} [color={_CULPRIT!r} penwidth=2.5]\n".replace("'", '"')

    def _caption(self) -> str:
        if len(self._kept) < len(self._nodes):
            return f"{len(self._kept)} of {len(self._nodes)} nodes, around the culprit (red)"
        if self._culprit is not None and self._culprit_sequence < 0:
            return f"{self._culprit.name} is not in this graph: what it was given needs no gradient"
        if self._culprit_sequence < 0:
            return "the way to the gradient that broke (orange)" if len(self._path) > 1 else ""
        return "the culprit (red), the way to it and to the gradient that broke (orange)"

    def _walk(self) -> None:
        waiting, seen = deque(self.roots), {id(n) for n in self.roots}
        while waiting:
            node = waiting.popleft()
            self._nodes.append(node)
            for below, _ in node.next_functions:
                if below is None:
                    continue
                self._users.setdefault(id(below), []).append(node)
                if id(below) not in seen:
                    seen.add(id(below))
                    waiting.append(below)

    def _path_of(self, replay: Replay) -> list[Any]:
        """From the loss to the culprit, and on to the parameter whose gradient broke."""
        culprit = next((n for n in self._nodes if _sequence(n) == self._culprit_sequence >= 0), None)
        wanted = replay.blame.end if replay.blame is not None else replay.bundle.record.parameter
        leaf = next((n for n in self._nodes if self._parameter(n) == wanted), None)
        path = self.roots[:1]
        for target in (culprit, leaf):
            if target is not None and path:
                path += self._way(path[-1], target)[1:]
        return path

    def _way(self, start: Any, target: Any) -> list[Any]:
        """Shortest way down from one node to another; empty if there is none."""
        came: dict[int, Any] = {id(start): None}
        waiting = deque([start])
        while waiting:
            node = waiting.popleft()
            if node is target:
                way = []
                while node is not None:
                    way.append(node)
                    node = came[id(node)]
                return way[::-1]
            for below, _ in node.next_functions:
                if below is not None and id(below) not in came:
                    came[id(below)] = node
                    waiting.append(below)
        return []

    def _kept_nodes(self) -> set[int]:
        if len(self._nodes) <= MOST_NODES:
            return {id(n) for n in self._nodes}
        path = self._path or self._nodes[:1]
        middle = next((i for i, n in enumerate(path) if _sequence(n) == self._culprit_sequence), len(path) - 1)
        kept = {id(n) for n in path[max(0, middle - _WINDOW) : middle + _WINDOW + 1]}
        waiting, seen = deque([path[middle]]), {id(path[middle])}
        most = len(kept) + _NEIGHBOURS
        while waiting and len(kept) < most:
            node = waiting.popleft()
            kept.add(id(node))
            for other in [n for n, _ in node.next_functions if n is not None] + self._users.get(id(node), []):
                if id(other) not in seen:
                    seen.add(id(other))
                    waiting.append(other)
        return kept

    def _parameter(self, node: Any) -> str | None:
        variable = getattr(node, "variable", None)
        return None if variable is None else self._names.get(id(variable))

    def _label(self, node: Any) -> str:
        variable = getattr(node, "variable", None)
        if variable is not None:
            shape = "x".join(map(str, variable.shape))
            return f"{self._names.get(id(variable), 'input')}\n{shape}"
        name = node.name().rpartition("::")[2]
        return "\n".join([name, *self._told.get(_sequence(node), [])])


class _Output:
    """Stands for a tensor: torchviz asks for no more of it."""

    def __init__(self, node: Any) -> None:
        self.grad_fn = node

    def size(self) -> tuple[int, ...]:
        """Its shape; what is written on it is set later."""
        return ()

    def _is_view(self) -> bool:
        return False


def _stand_in(label: str) -> Any:
    return type(label, (), {"next_functions": ()})()


def _sequence(node: Any) -> int:
    number = int(node._sequence_nr())
    return number if number < 2**63 else -1


def _is_node_of(operation: Operation, node: Any) -> bool:
    """True if the node is the operation's: one that needs no gradient has none, and the number of the node before."""
    if _sequence(node) != operation.sequence:
        return False
    kernel = operation.kernel.removeprefix("aten.").partition(".")[0]
    ours, theirs = (name.replace("_", "").lower() for name in (kernel, node.name().rpartition("::")[2]))
    return operation.backward or theirs.startswith(ours) or ours.startswith(theirs.partition("backward")[0])


def _told(culprit: Operation) -> list[str]:
    module = f"module {culprit.module}" if culprit.module else ""
    line = culprit.line.rpartition("/")[2]
    return [part for part in (module, line, culprit.text[:60]) if part]
