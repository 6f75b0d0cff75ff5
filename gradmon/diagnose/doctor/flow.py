"""Questions about the order of operations: what follows a layer, what goes around it, how deep a chain is.

Sets of operations are kept as the bits of whole numbers: thousands of operations cost milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gradmon.diagnose.doctor.trace import Operation
from gradmon.diagnose.doctor.vocabulary import RECURRENT


@dataclass(frozen=True, slots=True)
class Follower:
    """What comes next behind a layer with weights."""

    activation: Operation | None
    normalised: bool
    """A normalisation comes before the activation."""
    last: bool
    """Nothing with weights comes behind it."""


@dataclass(frozen=True, slots=True)
class Skip:
    """A sum `x + f(x)`: `around` is the operation that made x, None where two paths of like rank meet."""

    operation: Operation
    around: Operation | None


class Flow:
    """The graph of the operations of one forward."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations = tuple(operations)
        self._consumers: list[list[int]] = [[] for _ in operations]
        self._upstream: list[int] = []
        """Of each operation: itself and all it was made from, as bits."""
        for operation in self.operations:
            bits = 1 << operation.index
            for i in operation.inputs:
                self._consumers[i].append(operation.index)
                bits |= self._upstream[i]
            self._upstream.append(bits)
        self._data = sum(1 << operation.index for operation in self.operations if operation.from_data)
        self._bypassed = 0
        self.skips = [skip for operation in self.operations if (skip := self._skip(operation)) is not None]
        self._skipping = {skip.operation.index for skip in self.skips}

    def consumers(self, operation: Operation) -> list[Operation]:
        """Operations that use what it made."""
        return [self.operations[i] for i in self._consumers[operation.index]]

    def inputs(self, operation: Operation) -> list[Operation]:
        """Operations that made what it uses of data."""
        return [self.operations[i] for i in operation.inputs if self.operations[i].from_data]

    def leads_to(self, first: Operation, second: Operation) -> bool:
        """True if `second` was made from `first`."""
        return bool(self._upstream[second.index] >> first.index & 1)

    def bypassed(self, operation: Operation) -> bool:
        """True if a residual path goes around it: it may start small."""
        return bool(self._bypassed >> operation.index & 1)

    def following(self, operation: Operation) -> Follower:
        """What comes behind a layer with weights, through pooling, reshaping, dropout and sums."""
        normalised = False
        for near in self._onward(operation):
            if near.kind == "norm":
                normalised = True
            elif near.kind == "activation":
                return Follower(near, normalised, last=not self._leads_to_weight(operation))
            elif near.weighted:
                break
        return Follower(None, normalised, last=not self._leads_to_weight(operation))

    def layer_before(self, operation: Operation) -> tuple[Operation | None, bool]:
        """The layer with weights that feeds it, and whether a normalisation, sum or concatenation lies between."""
        mixed = False
        while True:
            inputs = self.inputs(operation)
            if not inputs:
                return None, mixed
            operation = inputs[0]
            if operation.weighted:
                return operation, mixed
            mixed |= operation.kind in ("norm", "sum", "concat") or len(inputs) > 1

    def stream_before(self, operation: Operation) -> Operation | None:
        """The sum or concatenation that the input of this one comes from, if no normalisation lies between."""
        while operation.kind in ("pass", "activation"):
            inputs = self.inputs(operation)
            if not inputs:
                return None
            operation = inputs[0]
        return operation if operation.kind in ("sum", "concat") else None

    def plain_between(self, first: Operation, second: Operation) -> bool:
        """True if `second` was made from `first` and no normalisation lies between."""
        if not self.leads_to(first, second):
            return False
        between = range(first.index + 1, second.index)
        return not any(
            self.operations[i].kind == "norm"
            and self.leads_to(first, self.operations[i])
            and self.leads_to(self.operations[i], second)
            for i in between
        )

    def deepest_plain_chain(self) -> list[Operation]:
        """The longest chain of unlike layers with weights without a normalisation, residual sum, join or gate in it."""
        chains: list[list[Operation]] = []
        longest: list[Operation] = []
        for operation in self.operations:
            chain = max((chains[i] for i in operation.inputs), key=len, default=[])
            ends = operation.kind in ("norm", "concat") or operation.name in RECURRENT or operation.name == "selu"
            if ends or operation.index in self._skipping:
                chain = []
            elif operation.weighted and operation.from_data:
                again = any(operation.parameters == earlier.parameters for earlier in chain)
                chain = chain if again else [*chain, operation]
            chains.append(chain)
            longest = max(longest, chain, key=len)
        return longest

    def _skip(self, operation: Operation) -> Skip | None:
        """Sums and concatenations of two paths from one place; marks what lies on the paths of a sum."""
        inputs = self.inputs(operation)
        if operation.kind not in ("sum", "concat") or len(inputs) < 2 or len(operation.shape) < 2:
            return None
        one, other = inputs[:2]
        first, second = self._upstream[one.index], self._upstream[other.index]
        if not first & second & self._data:
            return None
        if operation.kind == "sum":
            self._bypassed |= first ^ second
        if second >> one.index & 1:
            return Skip(operation, one)
        return Skip(operation, other if first >> other.index & 1 else None)

    def renormalised(self, operation: Operation) -> bool:
        """True if all layers with weights that come next are normalised: they take their input at any size."""
        found = [near for near in self._to_next_layers(operation) if near.weighted]
        return bool(found) and all(self.following(near).normalised for near in found)

    def reshaped(self, operation: Operation) -> bool:
        """True if its weights are computed from the parameters: their own size says nothing."""
        made = [self.operations[i] for i in operation.inputs if not self.operations[i].from_data]
        return any(o.parameters and o.kind != "pass" for o in made)

    def rescaled(self, operation: Operation) -> bool:
        """True if what it makes is multiplied by a number: its weights are as large as that asks for."""
        near = [o for o in self._onward(operation) if o.name in ("mul", "rmul", "imul", "div", "truediv")]
        return any(len(self.inputs(o)) == 1 for o in near)

    def _to_next_layers(self, operation: Operation) -> Iterator[Operation]:
        waiting, seen = [operation.index], {operation.index}
        while waiting:
            for i in self._consumers[waiting.pop()]:
                if i not in seen:
                    seen.add(i)
                    yield self.operations[i]
                    if not self.operations[i].weighted and self.operations[i].kind != "loss":
                        waiting.append(i)

    def _leads_to_weight(self, operation: Operation) -> bool:
        later = self.operations[operation.index + 1 :]
        return any(o.weighted and o.parameters and self.leads_to(operation, o) for o in later)

    def _onward(self, operation: Operation) -> Iterator[Operation]:
        """What comes behind it, nearest first, not past activations and layers with weights."""
        waiting, seen = [operation.index], {operation.index}
        while waiting:
            for i in self._consumers[waiting.pop(0)]:
                if i in seen:
                    continue
                seen.add(i)
                yield self.operations[i]
                if self.operations[i].kind in ("pass", "norm", "sum", "concat"):
                    waiting.append(i)
