"""A step's numbers on their way from the device to the host, and what they mean once they are there."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gradmon import stats
from gradmon.actions import name_verdict
from gradmon.detector import Limits
from gradmon.measuring import Measured
from gradmon.noise import NoiseScale
from gradmon.policy import incident
from gradmon.record import DETAIL_COLUMNS, STATISTICS, Detail, Event, Finding, RankIdentity, StepRecord, finite
from gradmon.replicas import differing
from gradmon.rows import (
    ROW,
    ROW_CHECKSUM,
    ROW_ERRORS,
    ROW_INF,
    ROW_JOINED,
    ROW_LOSS,
    ROW_LOSSES,
    ROW_MICRO_STEP,
    ROW_NAN,
    ROW_PARAMETER,
    ROW_SUM_OF_SQUARES,
    ROW_VALIDATION,
    ROW_VALIDATIONS,
)
from gradmon.stepping import StepInProgress
from gradmon.timing import Busy

#: Scalars at the head of a step's vector; the ranks' rows follow. From sum_of_squares on: over all parameters.
_HEAD = ("norm", "left", "divisor", "learning_rate", "errors", "ok", "loss_scale", "update_ratio", *STATISTICS)


#: (step, `Detail.values` or None, [P, 2] norms of moments or None) -> findings.
JudgeWeights = Callable[[int, "bytes | None", "list[list[float]] | None"], list[Finding]]

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
            self._host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
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
class ParameterStatistics:
    """stats_QK on its way to the host, and whose they are."""

    place: Literal["global", "local"]
    values: HostCopy
    numbers: tuple[int, ...]
    """Of the parameters, from 1."""


@dataclass(frozen=True, slots=True)
class StepContext:
    """What the host knew of a step when it ended."""

    step: int
    wall_seconds: float
    step_seconds: float | None
    busy: Busy | None
    data_wait_seconds: float | None
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
    elements: int
    """Elements of the global gradients."""
    all_rows: bool
    """True if the rows are of all ranks; else the one row is this rank's."""
    comparable: bool
    """False if ranks hold different parts, so that a larger norm blames nobody."""
    backwards: int
    """Backwards of this step, as far as they were seen."""
    scaled: bool
    """True if a GradScaler steps the optimizer: then a step that is not finite is its to skip."""
    left_out: bool
    """True if it has, without calling the optimizer's step."""
    leaves_out: bool
    """True if ranks that are not finite count for nothing in the average."""
    rolled_back: bool
    """True if the weights were replaced before the step, whose gradients were thrown away."""
    detail_due: bool
    judge_weights: JudgeWeights | None
    """On rank 0, whose journal holds the details."""
    noise: NoiseScale | None
    """Where the rows are samples of one noise."""


def pack(step: StepInProgress, update_ratio: Tensor | None) -> Tensor:
    """The step's vector, float64: `_HEAD`, then one row per rank."""
    verdict, measured = step.verdict, step.measured
    unknown = torch.full_like(verdict.norm, math.nan)
    rate = step.rate.to(verdict.norm).reshape(()) if isinstance(step.rate, Tensor) else unknown
    scale = unknown if step.loss_scale is None else step.loss_scale.to(verdict.norm).reshape(())
    ratio = unknown if update_ratio is None else update_ratio.to(verdict.norm)
    errors = measured.rows[:, ROW_ERRORS].sum()
    ok = torch.ones_like(verdict.norm) if measured.ok is None else measured.ok.double()
    scalars = torch.stack((verdict.norm, verdict.left, verdict.divisor, rate, errors, ok, scale, ratio))
    stats_QK = measured.stats_QK
    if not len(stats_QK):
        return torch.cat((scalars, torch.zeros_like(stats_QK[:0]).sum(0), measured.rows.flatten()))
    sums = stats_QK[:, : stats.SUMS].sum(0)
    extremes = unknown.expand(3)
    if measured.full:
        extremes = stats_QK[:, stats.ABS_MAX :].amax(0)
        extremes[1] = stats_QK[:, stats.MINIMUM].amin()
    return torch.cat((scalars, sums, extremes, measured.rows.flatten()))


#: What all ranks must know of a step that looks healthy: by rank.
_PEEKED = (
    ROW_SUM_OF_SQUARES,
    ROW_LOSS,
    ROW_LOSSES,
    ROW_VALIDATION,
    ROW_VALIDATIONS,
    ROW_CHECKSUM,
    ROW_JOINED,
)


@dataclass(frozen=True, slots=True)
class Peeked:
    """What a rank decides by, one step later; equal on all ranks."""

    record: StepRecord
    """Without its loss, and without what rows tell if the step was healthy."""
    errors: int
    """Failures of gradmon itself on all ranks so far."""
    mean_loss: float | None
    """Over the ranks that observed one; None if none did, or the ranks' rows did not meet."""
    left_out: tuple[int, ...]
    """Ranks left out of the average."""
    differing: tuple[int, ...] | None
    """Ranks whose weights differ from those of most; None where they were not compared."""
    losses: tuple[float | None, ...] = ()
    """By rank, None where none was observed; empty where the ranks' rows did not meet."""
    validation_loss: float | None = None
    """The newest, mean over the ranks that have observed one."""
    validations: int = 0
    """How many all ranks have observed so far."""
    alone: bool = False
    """True inside `Join` if a rank had run out of data and made no step of its own."""


class LandingStep:
    """One step between its end and its place in the journal. Implements `record.Landing`."""

    def __init__(
        self,
        vector: HostCopy,
        context: StepContext,
        details: Sequence[ParameterStatistics] = (),
        update_ratios_P: HostCopy | None = None,
        moments_PM: HostCopy | None = None,
    ) -> None:
        self._vector = vector
        self._context = context
        self._details = details
        self._update_ratios_P = update_ratios_P
        self._moments_PM = moments_PM
        self._looked_at: bytes | None = None
        self._broken = False
        self.loss: HostCopy | None = None
        """Mean loss of the step, 0-dim, if one was observed."""

    def landed(self) -> bool:
        """True once the record can be made without waiting."""
        later = (self.loss, self._update_ratios_P, self._moments_PM, *(part.values for part in self._details))
        return self._vector.landed() and all(copy is None or copy.landed() for copy in later)

    def peek(self) -> Peeked:
        """For the training thread, one step later. Whole rows are read only if something was wrong."""
        known = self._context
        values = self._vector.values()
        head: list[float] = values[: len(_HEAD)].tolist()
        rows_WR = values[len(_HEAD) :].view(-1, len(ROW))
        squares, losses, observed, validation, validations, checksums, joined = (
            rows_WR.index_select(1, stats.numbers(_PEEKED, rows_WR.device)).t().tolist()
        )
        record = self._record(head, None, None, None)
        broken = [rank for rank, square in enumerate(squares) if not math.isfinite(square)]
        if not record.healthy or (broken and known.leaves_out):
            record = self._record(head, rows_WR.tolist(), None, None)
        compared = known.all_rows and len(checksums) > 1 and any(checksums)
        return Peeked(
            record=record,
            errors=int(head[_HEAD.index("errors")]),
            mean_loss=_mean_loss(losses, observed) if known.all_rows else None,
            losses=tuple(x if there else None for x, there in zip(losses, observed, strict=True))
            if known.all_rows
            else (),
            validation_loss=_mean_loss(validation, validations) if known.all_rows else None,
            validations=int(sum(validations)) if known.all_rows else 0,
            left_out=tuple(broken) if known.leaves_out and record.reason != "nonfinite" else (),
            differing=differing(checksums) if compared else None,
            alone=known.all_rows and any(joined),
        )

    def record(self, memory_bytes: int | None) -> tuple[StepRecord, list[Event]]:
        """For the journal's thread: the whole record, and the event if the step was an incident."""
        values = self._vector.values()
        head: list[float] = values[: len(_HEAD)].tolist()
        rows: list[list[float]] = values[len(_HEAD) :].view(-1, len(ROW)).tolist()
        loss = None if self.loss is None else float(self.loss.values())
        record = self._record(head, rows, loss, memory_bytes)
        if self._context.busy is not None:
            record = dataclasses.replace(record, busy_seconds=self._context.busy.seconds())
        self._broken = record.broken
        event = incident(record)
        return record, [] if event is None else [event]

    def details(self) -> list[Detail]:
        """For the journal's thread, after `record`: what is global from rank 0 at the cadence, all of a broken step."""
        known = self._context
        made = []
        for part in self._details:
            wanted = self._broken or (part.place == "global" and known.detail_due and known.rank == 0)
            if wanted and (part.place == "local" or known.rank == 0):
                made.append(Detail(known.step, part.place, self._table(part)))
                if part.place == "global" and not self._broken:
                    self._looked_at = made[-1].values
        return made

    def findings(self) -> list[Event]:
        """For the journal's thread, after `details`: what they show of weights, gradients and optimizer."""
        known = self._context
        if known.judge_weights is None:
            return []
        moments = None if self._moments_PM is None else self._moments_PM.values().tolist()
        found = known.judge_weights(known.step, self._looked_at, moments)
        return [finding.event(known.step, known.wall_seconds) for finding in found]

    def _table(self, part: ParameterStatistics) -> bytes:
        table_PK = torch.full(
            (len(self._context.names), len(DETAIL_COLUMNS)), math.nan, dtype=torch.float64, device="cpu"
        )
        rows = torch.tensor(part.numbers, dtype=torch.int64, device="cpu") - 1
        table_PK[rows, : len(STATISTICS)] = part.values.values()
        if self._update_ratios_P is not None:
            table_PK[rows, -1] = self._update_ratios_P.values()[rows]
        return ctypes.string_at(table_PK.data_ptr(), table_PK.numel() * table_PK.element_size())

    def _record(
        self, head: list[float], rows: list[list[float]] | None, loss: float | None, memory_bytes: int | None
    ) -> StepRecord:
        known = self._context
        norm, left, divisor, rate, _errors, ok, loss_scale, update_ratio, _squares, *counts, abs_max, low, high = head
        nan_count, inf_count, zero_count = counts
        action, why, applied_norm = name_verdict(norm, left, divisor, known.limits)
        seen = _Rows(rows, known) if rows is not None else None
        if not known.judged and why != "nonfinite":
            action, why = "none", "unsynced"
        if known.left_out or (known.scaled and why == "nonfinite"):
            action, why, applied_norm = "skip", "scaler_skip", 0.0
        if not ok:
            action, why = "none", "unsynced"
        if not (known.synced and ok) and why != "scaler_skip":
            norm = left = applied_norm = math.nan
        if known.leaves_out and seen is not None and seen.broken and why in ("healthy", "max_norm"):
            action, why = "leave_out", "left_out"
        if known.rolled_back:
            action, why, applied_norm = "rollback", "diverging", 0.0
        culprit, parameter, micro_step = (None, None, None) if seen is None else seen.culprit(why)
        applied = known.applied or why in ("scaler_skip", "diverging", "left_out")
        record = StepRecord(
            step=known.step,
            wall_seconds=known.wall_seconds,
            step_seconds=known.step_seconds,
            grad_norm=norm,
            grad_norm_applied=applied_norm if applied else left,
            grad_norm_limit=known.limits.spike_above if math.isfinite(known.limits.spike_above) else None,
            local_grad_norm=None if seen is None else _root(seen.mine[ROW_SUM_OF_SQUARES]),
            nan_count=_whole(nan_count),
            inf_count=_whole(inf_count),
            local_nan_count=0 if seen is None else int(seen.mine[ROW_NAN]),
            local_inf_count=0 if seen is None else int(seen.mine[ROW_INF]),
            action=action,
            reason=why,
            applied=applied,
            culprit_rank=culprit,
            parameter=parameter,
            learning_rate=rate if known.learning_rate is None else known.learning_rate,
            learning_rate_scale=known.learning_rate_scale,
            loss=loss,
            memory_bytes=memory_bytes,
            grad_abs_max=finite(abs_max),
            grad_min=finite(low),
            grad_max=finite(high),
            zero_count=None if math.isnan(zero_count) else _whole(zero_count),
            element_count=known.elements,
            micro_step=micro_step,
            loss_scale=finite(loss_scale),
            update_ratio=finite(update_ratio),
            data_wait_seconds=known.data_wait_seconds,
            left_out=known.leaves_out and why in ("left_out", "spike") and seen is not None and seen.mine_broken,
        )
        return record if seen is None else dataclasses.replace(record, **seen.sums(record))


class Lander:
    """Sends one rank's finished steps on their way to the host.

    Args:
        identity: who this rank is.
        names: of the watched parameters.
        judge_weights: is given what is known of each parameter, where it is this rank that judges; on the journal's
            thread.
        comparable: see `StepContext`.
    """

    def __init__(
        self, identity: RankIdentity, names: list[str], judge_weights: JudgeWeights | None, *, comparable: bool
    ) -> None:
        self._rank = identity.rank
        self._world_size = identity.world_size
        self._names = names
        self._comparable = comparable
        self._judge_weights = judge_weights
        self._noise = NoiseScale()

    def land(
        self,
        step: StepInProgress,
        *,
        step_seconds: float | None,
        busy: Busy | None,
        data_wait_seconds: float | None,
        updates: tuple[Tensor, Tensor] | None,
        moments_PM: Tensor | None,
        with_details: bool,
    ) -> LandingStep:
        """Send one; nothing is waited for.

        Args:
            step: finished now.
            step_seconds: since the end of the step before, without pauses.
            busy: until this rank's gradients were ready, if known.
            data_wait_seconds: waited for a DataLoader, if there is one.
            updates: from `UpdateSample.ratios`, in steps in which it was due.
            moments_PM: from `MomentSample.norms`, likewise.
            with_details: whether to take statistics per parameter along.
        """
        context = self._context(step, step_seconds, busy, data_wait_seconds)
        details = _details_of(step.measured) if with_details else []
        ratios_P, ratio = (None, None) if updates is None else updates
        vector = HostCopy(pack(step, ratio))
        ratios, moments = (None if values is None else HostCopy(values) for values in (ratios_P, moments_PM))
        return LandingStep(vector, context, details, ratios, moments)

    def _context(
        self, step: StepInProgress, step_seconds: float | None, busy: Busy | None, data_wait_seconds: float | None
    ) -> StepContext:
        measured = step.measured
        return StepContext(
            step=step.number,
            wall_seconds=time.time(),
            step_seconds=step_seconds,
            busy=busy,
            data_wait_seconds=data_wait_seconds,
            limits=step.limits,
            judged=step.judged,
            synced=measured.synced,
            applied=step.acting,
            learning_rate=None if isinstance(step.rate, Tensor) else step.rate,
            learning_rate_scale=step.scale,
            rank=self._rank,
            names=self._names,
            elements=measured.elements,
            all_rows=measured.shared or self._world_size == 1,
            comparable=self._comparable,
            backwards=measured.backwards,
            scaled=step.loss_scale is not None,
            left_out=step.left_out,
            leaves_out=measured.leaves_out,
            rolled_back=step.rolled_back,
            detail_due=step.detail_due,
            judge_weights=self._judge_weights,
            # Rows that are samples of one noise: of all ranks, of one backward each.
            noise=self._noise if measured.synced_backwards == 1 and measured.shared else None,
        )


def _details_of(measured: Measured) -> list[ParameterStatistics]:
    details = [ParameterStatistics("global", HostCopy(measured.stats_QK), measured.numbers)]
    if measured.local is not None:
        details.append(ParameterStatistics("local", HostCopy(measured.local[0]), measured.local[1]))
    return details


def _root(sum_of_squares: float) -> float:
    return math.sqrt(sum_of_squares) if sum_of_squares >= 0 else math.nan


def _mean_loss(losses: Sequence[float], observed: Sequence[float]) -> float | None:
    """NaN if any rank's is: it must not be averaged away."""
    seen = [loss for loss, there in zip(losses, observed, strict=True) if there]
    return sum(seen) / len(seen) if seen else None


def _whole(count: float) -> int:
    """A count over shards; replicas were added as parts of one."""
    return math.ceil(count - 1e-6)


class _Rows:
    """What the rows of all ranks (or this one's alone) say of a step."""

    def __init__(self, rows: list[list[float]], known: StepContext) -> None:
        self._rows = rows
        self._known = known
        self.mine = rows[known.rank if known.all_rows and len(rows) > 1 else 0]
        self.broken = [rank for rank, row in enumerate(rows) if not math.isfinite(row[ROW_SUM_OF_SQUARES])]

    @property
    def mine_broken(self) -> bool:
        """True if this rank's own gradients were not finite."""
        return not math.isfinite(self.mine[ROW_SUM_OF_SQUARES])

    def sums(self, record: StepRecord) -> dict[str, Any]:
        """Fields of the record that are about all ranks; none where only this one's row is known."""
        rows, known = self._rows, self._known
        found: dict[str, Any] = {}
        observed = [row[ROW_LOSS] for row in rows if row[ROW_LOSSES]]
        if observed and known.all_rows:
            found["mean_loss"] = sum(observed) / len(observed)
            found["max_loss"] = max(observed, key=lambda loss: math.inf if math.isnan(loss) else loss)
        if not (known.all_rows and known.comparable and known.synced):
            return found
        squares = [row[ROW_SUM_OF_SQUARES] for row in rows if math.isfinite(row[ROW_SUM_OF_SQUARES])]
        found["healthy_ranks"] = len(squares)
        if squares:
            mean = sum(squares) / len(squares)
            found |= {"local_grad_norm_rms": math.sqrt(mean), "local_grad_norm_max": math.sqrt(max(squares))}
            if known.noise is not None and record.healthy:
                found["noise_scale_ratio"] = known.noise.update(mean, record.grad_norm**2, len(rows))
        return found

    def culprit(self, why: str) -> tuple[int | None, str | None, int | None]:
        """Rank, parameter and micro-step that broke the step; None where none stands out or is known."""
        rows, known = self._rows, self._known
        if why in ("nonfinite", "scaler_skip", "left_out"):
            broken = self.broken
            if not broken:  # every rank was finite, their average was not
                return None, None, None
            place = broken[0]
            nobodys = len(rows) > 1 and len(broken) == len(rows)  # broken alike, as when the weights themselves are NaN
        elif why == "spike":
            place = max(range(len(rows)), key=lambda rank: rows[rank][ROW_SUM_OF_SQUARES])
            nobodys = not known.comparable or not _stands_out(rows, place)
        else:
            return None, None, None
        number, micro_step = int(rows[place][ROW_PARAMETER]), int(rows[place][ROW_MICRO_STEP])
        parameter = known.names[number - 1] if 0 < number <= len(known.names) else None
        named = micro_step if micro_step and known.backwards > 1 and why != "spike" else None
        return None if nobodys else (place if known.all_rows and len(rows) > 1 else known.rank), parameter, named


def _stands_out(rows: list[list[float]], place: int) -> bool:
    """A bad batch is one rank's; a bad learning rate makes all ranks spike alike, and then none is to blame."""
    others = [row[ROW_SUM_OF_SQUARES] for rank, row in enumerate(rows) if rank != place]
    return not others or rows[place][ROW_SUM_OF_SQUARES] > _OUTSTANDING**2 * statistics.median(others)
