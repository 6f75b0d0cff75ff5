"""A step's numbers on their way from the device to the host, and what they mean once they are there."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmon.actions import Verdict, name_verdict
from gradmon.detector import Limits
from gradmon.local import (
    ROW,
    ROW_ERRORS,
    ROW_INF,
    ROW_NAN,
    ROW_PARAMETER,
    ROW_SUM_OF_SQUARES,
)
from gradmon.policy import incident
from gradmon.record import Event, StepRecord

#: Scalars at the head of a step's vector; the ranks' rows follow.
_HEAD = ("norm", "left", "divisor", "learning_rate", "errors", "sum_of_squares", "nan_count", "inf_count")


#: A rank is blamed for a spike if its local norm is this many times the median of the other ranks'.
_OUTSTANDING = 3.0


class HostCopy:
    """A tensor that is being copied to pinned memory; on CPU it is there already.

    A pageable copy could be read before it has landed, so the memory is pinned and an event tells when.
    """

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = values
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(values.device))
        elif values.device.type != "cpu":
            self._host = values.cpu()  # sync: devices other than CUDA have no events here

    def landed(self) -> bool:
        """True once `values` may be read without waiting."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def values(self) -> Tensor:
        """The tensor on the host; waits for the copy's event, which is one step old when gradmon asks."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


@dataclass(frozen=True, slots=True)
class StepContext:
    """What the host knew of a step when it ended."""

    step: int
    wall_seconds: float
    step_seconds: float | None
    limits: Limits
    judged: bool
    """False if the gradients differed between ranks, or were computed inside the step."""
    synced: bool
    """False if the gradients were not averaged over the ranks: then no norm here is global."""
    applied: bool
    learning_rate: float | None
    """None if it travels in the vector, because it is a tensor."""
    learning_rate_scale: float
    rank: int
    names: list[str]


def pack(verdict: Verdict, stats_sums_K: Tensor, rows_WR: Tensor, learning_rate: Tensor | None) -> Tensor:
    """The step's vector, float64: `_HEAD`, then one row per rank."""
    rate = verdict.skip if learning_rate is None else learning_rate.to(verdict.norm).reshape(())
    scalars = torch.stack((verdict.norm, verdict.left, verdict.divisor, rate, rows_WR[:, ROW_ERRORS].sum()))
    return torch.cat((scalars, stats_sums_K, rows_WR.flatten()))


class LandingStep:
    """One step between its end and its place in the journal. Implements `journal.Landing`."""

    def __init__(self, vector: HostCopy, context: StepContext) -> None:
        self._vector = vector
        self._context = context
        self.loss: HostCopy | None = None
        """Mean loss of the step, 0-dim, if one was observed."""

    def landed(self) -> bool:
        """True once the record can be made without waiting."""
        return self._vector.landed() and (self.loss is None or self.loss.landed())

    def peek(self) -> tuple[StepRecord, int]:
        """For the training thread, one step later: the record without its loss, and the ranks' errors so far.

        The rows are read only if something was wrong: there is one for every rank of the job.
        """
        values = self._vector.values()
        head: list[float] = values[: len(_HEAD)].tolist()
        record = self._record(head, None, None, None)
        if not record.healthy:
            record = self._record(head, values[len(_HEAD) :].view(-1, len(ROW)).tolist(), None, None)
        return record, int(head[_HEAD.index("errors")])

    def record(self, memory_bytes: int | None) -> tuple[StepRecord, list[Event]]:
        """For the journal's thread: the whole record, and the event if the step was an incident."""
        values = self._vector.values()
        head: list[float] = values[: len(_HEAD)].tolist()
        rows: list[list[float]] = values[len(_HEAD) :].view(-1, len(ROW)).tolist()
        loss = None if self.loss is None else float(self.loss.values())
        record = self._record(head, rows, loss, memory_bytes)
        event = incident(record)
        return record, [] if event is None else [event]

    def _record(
        self, head: list[float], rows: list[list[float]] | None, loss: float | None, memory_bytes: int | None
    ) -> StepRecord:
        known = self._context
        norm, left, divisor, rate, _errors, _squares, nan_count, inf_count = head
        action, why, applied_norm = name_verdict(norm, left, divisor, known.limits)
        if not known.judged and why != "nonfinite":
            action, why = "none", "unsynced"
        if not known.synced:
            norm = left = applied_norm = math.nan
        culprit, parameter = _culprit(rows, why, known) if rows is not None else (None, None)
        mine = None if rows is None else rows[known.rank if len(rows) > 1 else 0]
        return StepRecord(
            step=known.step,
            wall_seconds=known.wall_seconds,
            step_seconds=known.step_seconds,
            grad_norm=norm,
            grad_norm_applied=applied_norm if known.applied else left,
            grad_norm_limit=known.limits.spike_above if math.isfinite(known.limits.spike_above) else None,
            local_grad_norm=None if mine is None else _root(mine[ROW_SUM_OF_SQUARES]),
            nan_count=int(nan_count),
            inf_count=int(inf_count),
            local_nan_count=0 if mine is None else int(mine[ROW_NAN]),
            local_inf_count=0 if mine is None else int(mine[ROW_INF]),
            action=action,
            reason=why,
            applied=known.applied,
            culprit_rank=culprit,
            parameter=parameter,
            learning_rate=rate if known.learning_rate is None else known.learning_rate,
            learning_rate_scale=known.learning_rate_scale,
            loss=loss,
            memory_bytes=memory_bytes,
        )


def _root(sum_of_squares: float) -> float:
    return math.sqrt(sum_of_squares) if sum_of_squares >= 0 else math.nan


def _culprit(rows: list[list[float]], why: str, known: StepContext) -> tuple[int | None, str | None]:
    """Rank and parameter that broke the step; None where no rank stands out or none is known."""
    if why == "nonfinite":
        broken = [rank for rank, row in enumerate(rows) if not math.isfinite(row[ROW_SUM_OF_SQUARES])]
        if not broken:  # every rank was finite, their average was not
            return None, None
        place = broken[0]
    elif why == "spike":
        place = max(range(len(rows)), key=lambda rank: rows[rank][ROW_SUM_OF_SQUARES])
    else:
        return None, None
    number = int(rows[place][ROW_PARAMETER])
    parameter = known.names[number - 1] if 0 < number <= len(known.names) else None
    nobodys = len(rows) > 1 and len(broken) == len(rows) if why == "nonfinite" else not _stands_out(rows, place)
    if nobodys:  # every rank is broken alike, as when the weights themselves are NaN
        return None, parameter
    return (place if len(rows) > 1 else known.rank), parameter


def _stands_out(rows: list[list[float]], place: int) -> bool:
    """A bad batch is one rank's; a bad learning rate makes all ranks spike alike, and then none is to blame."""
    others = [row[ROW_SUM_OF_SQUARES] for rank, row in enumerate(rows) if rank != place]
    return not others or rows[place][ROW_SUM_OF_SQUARES] > _OUTSTANDING**2 * statistics.median(others)
