"""What a step's gradients are, before any clip: one process, DDP, FSDP2 and tensor parallelism behind one face.

    measure()   reads the gradients that are there, also wherever the script clips; communicates only where torch's
                own clip would: to add up partial gradients, which sequence parallelism leaves behind
    share()     at step time, where every rank comes: makes the numbers those of all ranks

Under DDP the rows of all ranks have come with the last bucket already, and `share` has nothing to do (unless devices
or thread counts differ). Beside a communication hook of the script's, and where each rank holds a part of the
parameters, it is one packed all-reduce.

Legend: P watched parameters, Q of them with a gradient, K statistics, W ranks, R columns of a rank's row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gradmon import stats
from gradmon.backward import BackwardWatch
from gradmon.config import MeasureConfig
from gradmon.local import RegistrationWatch
from gradmon.replicas import checksum
from gradmon.rows import (
    ROW,
    ROW_ERRORS,
    ROW_LEFT,
    ROW_MICRO_STEP,
    ROW_NORM,
    ROW_PARAMETER,
    ROW_SUM_OF_SQUARES,
    ROW_SYNCED,
    Observed,
    put_losses,
    rank_row,
    whole,
)
from gradmon.sharding import ShardedBackward
from gradmon.timing import Stamp
from gradmon.topology import Topology, Watched, parameters_of


@dataclass(slots=True)
class Measured:
    """Gradients as the optimizer was to get them, before any clip; of this rank's parts until they are shared."""

    stats_QK: Tensor
    numbers: tuple[int, ...]
    """Of the Q parameters, from 1."""
    elements: int
    """In all Q gradients; sharded ones count whole."""
    norm: Tensor
    """0-dim float64. Under sharding only `share` makes it right."""
    rows: Tensor
    """One row for each rank, or this rank's alone until they are shared."""
    from_backward: bool
    """True if `rows` was measured during backward, before a GradScaler's `unscale_`."""
    shared: bool
    """True if `rows` is of all ranks."""
    synced: bool
    """False if the gradients were not averaged in this step (all backwards under `no_sync`)."""
    full: bool
    """True if the extremes of all gradients are there."""
    backwards: int
    """Backwards that made these gradients, as far as they were seen."""
    synced_backwards: int
    """Those of them that averaged; of several, the rows are no samples of one noise."""
    leaves_out: bool = False
    """True if ranks whose gradients are not finite counted for nothing in the average."""
    ok: Tensor | None = None
    """0-dim on the device: False if this step is to be left alone, as only the rows of all ranks tell. None: True."""
    failed: bool = False
    """True if this rank could not measure."""
    local: tuple[Tensor, tuple[int, ...]] | None = None
    """stats_QK of this rank's own gradients before they were averaged, with numbers; None where not known."""


class Measurer:
    """Measures the watched parameters of one model.

    Args:
        watched: parameters and optimizers; parameters added to an optimizer later are added here.
        topology: how gradients become global.
        config: cadences.
        agree: True if norms of all ranks must be made equal (devices or thread counts differ).
        leave_out: whether DDP's average is to be over the ranks whose gradients are finite.
        say: tells the user something once.
        failed: told of a failure in backward.
    """

    def __init__(
        self,
        watched: Watched,
        topology: Topology,
        config: MeasureConfig,
        *,
        agree: bool,
        leave_out: bool,
        say: Callable[[str], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self.watched = watched
        self.errors = 0
        """Failures of gradmon itself on this rank that all ranks must learn of."""
        self.observed = Observed()
        """Losses on this rank; they travel with its rows."""
        self._topology = topology
        self._config = config
        self._agree = agree
        self._leave_out = leave_out
        self._say = say
        self._failed = failed
        self._held = self._ids_held()
        self._averaged = False
        self._averagings = 0
        self._settled = False
        """True once this rank's part in adding up partial gradients is done."""
        self._registrations = RegistrationWatch()
        micro = config.micro_steps == "auto"
        self._backwards = self._watch_backwards(micro)
        self._sharded_backward: ShardedBackward | None = None
        if topology.sharding is not None and topology.kind != "tensor_parallel":
            self._sharded_backward = ShardedBackward(topology.model, watched.parameters, failed, micro=micro)

    def _watch_backwards(self, micro: bool) -> BackwardWatch | None:
        known, ddp = self._topology, self._topology.ddp
        if known.taken and ddp is not None:
            return BackwardWatch(
                self.watched.parameters,
                self._ended_beside_a_hook,
                at_arrival=ddp.gradient_as_bucket_view,
                on_error=self._failed,
            )
        if not micro or not known.acts or known.kind.startswith(("fsdp2", "hsdp")):
            return None
        watch = BackwardWatch(self.watched.parameters, self._is_micro_step, at_arrival=False, on_error=self._failed)
        if known.hook is not None:
            known.hook.backwards = watch
        return watch

    def _is_micro_step(self) -> bool:
        """True for a backward that is not the last of its step: the last one is measured anyway."""
        ddp, watch = self._topology.ddp, self._backwards
        if ddp is not None:
            return not ddp.require_backward_grad_sync
        return watch is not None and watch.count < watch.taken

    def _ended_beside_a_hook(self) -> bool:
        ddp = self._topology.ddp
        self._averaged = ddp is not None and bool(ddp.require_backward_grad_sync)  # of the newest backward
        self._averagings += self._averaged
        return True

    def start(self) -> None:
        """Listen to backward from now on."""
        hook = self._topology.hook
        if hook is not None:
            hook.start(self.watched.parameters, self._failed, leave_out=self._leave_out)
            hook.observed = self.observed
            self._registrations.start(
                lambda: self._say(
                    "the script's own communication hook averages the gradients from here on; gradmon measures before "
                    "it and adds one small all-reduce per step"
                )
            )
        for watch in (self._backwards, self._sharded_backward):
            if watch is not None:
                watch.start()

    def stop(self) -> None:
        """Remove every hook; DDP's own becomes a pass-through."""
        hook = self._topology.hook
        if hook is not None:
            self._registrations.stop()
            hook.backwards = None
            hook.stop()
        for watch in (self._backwards, self._sharded_backward):
            if watch is not None:
                watch.stop()

    def forget(self) -> None:
        """The step is over: what backward left behind is no longer of the gradients to come."""
        if self._topology.hook is not None:
            self._topology.hook.forget()
        for watch in (self._backwards, self._sharded_backward):
            if watch is not None:
                watch.forget()

    def count_error(self) -> None:
        """All ranks must learn that this one failed."""
        self.errors += 1
        if self._topology.hook is not None:
            self._topology.hook.errors = self.errors

    def compare_weights(self, *, due: bool) -> None:
        """Let the next step's rows carry a checksum of this rank's weights, where all ranks hold the same.

        Beside a hook of the script's nobody knows: local SGD lets replicas differ on purpose.
        """
        hook = self._topology.hook
        if hook is not None:
            hook.checksum = None
            if due and hook.shares:
                hook.checksum = checksum(self.watched.parameters)

    def may_judge(self) -> bool:
        """False inside `Join` where a rank that has run out of data would miss an all-reduce at step time."""
        known = self._topology
        if known.hook is not None and known.divides_by_those_left():
            self._say(
                "model.join(divide_by_initial_world_size=False) has no effect while gradmon is attached: gradients are "
                "divided by the initial world size"
            )
        return not (known.joining() and (self._agree or self._shares_at_step))

    @property
    def _shares_at_step(self) -> bool:
        """True where rows travel at step time: sharded, or beside a hook of the script's. Equal on all ranks."""
        known = self._topology
        return known.acts and (
            known.sharding is not None or known.taken or (known.hook is not None and not known.hook.shares)
        )

    @property
    def backward_came(self) -> bool:
        """False if no backward has run since the gradients were measured; True if one has, or nobody can tell."""
        seen: list[bool] = []
        if self._backwards is not None:
            seen.append(self._backwards.count > 0)
        if self._topology.hook is not None:
            seen.append(self._topology.hook.came)
        if self._sharded_backward is not None:
            seen.append(self._sharded_backward.came)
        return any(seen) or not seen

    @property
    def backwards(self) -> int | None:
        """Backwards of the step in progress so far; None where they are not counted."""
        return None if self._backwards is None else self._backwards.count

    @property
    def sent(self) -> bool:
        """True if this step's rows have gone out with the gradients, before the step."""
        return self._topology.hook is not None and self._topology.hook.shares and self._topology.hook.came

    @property
    def ready(self) -> Stamp | None:
        """When this rank's gradients were ready to meet the others' in this step; None where nobody can tell."""
        return None if self._topology.hook is None else self._topology.hook.ready

    def gradients(self) -> list[Tensor]:
        """Those that are there, in the model's order."""
        return [p.grad for p in self.watched.parameters if p.grad is not None]

    def measure(self, *, extremes: bool, zeros: bool, alarm: float) -> Measured:
        """Read the gradients that are there now.

        Args:
            extremes: whether minimum, maximum and abs_max are wanted in any case.
            zeros: the same for the number of zeros.
            alarm: on CPU a norm above this, or one that is not finite, gets full statistics at once.
        """
        self._watch_new_parameters()
        for watch in (self._backwards, self._sharded_backward):
            if watch is not None:
                watch.take()
        present = [(p.grad, n) for n, p in enumerate(self.watched.parameters, start=1) if p.grad is not None]
        numbers = tuple(n for _, n in present)
        parts = [g for g, _ in present]
        stats_QK = self._measured(parts, extremes=extremes, zeros=zeros)
        norm = stats.total_norm(stats_QK)
        # On CPU a look at the norm is free. Parts of a whole can't tell whether the whole is too large.
        looks = stats.reads_are_free(norm.device) and self._topology.sharding is None
        if looks and not float(norm) <= alarm and parts:
            stats_QK, extremes, zeros = stats.measure(parts), True, True
        found = self._rows_of_backward()
        hook = self._topology.hook
        rows = self._own_row(stats_QK, numbers).unsqueeze(0) if found is None else found
        return Measured(
            stats_QK=stats_QK,
            numbers=numbers,
            elements=sum(map(stats.elements, parts)),
            norm=norm,
            rows=rows,
            from_backward=found is not None,
            shared=found is not None and hook is not None and hook.shares,
            synced=self._synced(),
            full=extremes or norm.device.type == "cuda",
            backwards=self._backwards_taken(),
            synced_backwards=self._take_synced_backwards(),
            leaves_out=hook is not None and hook.leaves_out,
            local=self._local(),
        )

    def measure_left(self) -> Tensor:
        """What the script's own clip has left: the norm, or under sharding this rank's share of its square."""
        stats_QK = self._measured(self.gradients(), extremes=False, zeros=False)
        squares = stats_QK[:, stats.SUM_OF_SQUARES].sum()
        return squares if self._topology.sharding is not None else squares.sqrt()

    def unscale(self, measured: Measured, left: Tensor | None, scale: Tensor, scaled: set[int]) -> None:
        """Divide a GradScaler's factor out of what still carries it, before it is shared.

        Args:
            measured: changed in place.
            left: changed in place; None if the script has not clipped.
            scale: the factor, one element.
            scaled: ids of the parameters whose gradients have not been unscaled yet.
        """
        factor = scale.to(measured.norm).reshape(())
        carries = [id(self.watched.parameters[number - 1]) in scaled for number in measured.numbers]
        if measured.from_backward or all(carries):
            measured.rows = measured.rows.clone()
            measured.rows[:, ROW_SUM_OF_SQUARES] /= factor.square()
        if measured.local is not None:
            local_PK, numbers = measured.local[0].clone(), measured.local[1]
            local_PK[:, stats.SUM_OF_SQUARES] /= factor.square()
            local_PK[:, stats.ABS_MAX :] /= factor
            measured.local = (local_PK, numbers)
        if any(carries):
            factor_Q1 = 1 + stats.constants(tuple(map(float, carries)), factor.device).unsqueeze(1) * (factor - 1)
            measured.stats_QK = measured.stats_QK.clone()
            measured.stats_QK[:, stats.SUM_OF_SQUARES] /= factor_Q1[:, 0].square()
            measured.stats_QK[:, stats.ABS_MAX :] /= factor_Q1
            measured.norm = stats.total_norm(measured.stats_QK)
            if left is not None:
                left /= factor if self._topology.sharding is None else factor.square()

    def share(self, measured: Measured, left: Tensor | None, *, extremes: bool, errors: int) -> Tensor:
        """Make `measured` that of all ranks. Every rank comes here in every step, in the same order.

        Whether there is a collective depends only on what is equal on all ranks, never on what this rank has seen.

        Args:
            measured: changed in place.
            left: from `measure_left` if the script has clipped since; None if it has not.
            extremes: whether global extremes are wanted from shards: one more all-reduce. Equal on all ranks.
            errors: of all ranks, as known from earlier steps. With more in these rows the step is left alone: a rank
                that could not measure an earlier one has other limits now.

        Returns:
            The norm of what the optimizer would use now, 0-dim.
        """
        known = self._topology
        if not known.acts:
            return measured.norm if left is None else left
        if known.sharding is not None:
            left = self._share_parts(measured, left, extremes=extremes)
        else:
            left = self._share_norms(measured, measured.norm if left is None else left)
        if known.group is not None and measured.shared:
            measured.ok = measured.rows[:, ROW_ERRORS].sum() <= errors
            if self._shares_at_step and known.sharding is None:
                measured.ok = measured.ok.logical_and(measured.rows[:, ROW_SYNCED].amin() > 0)
        return left

    def _share_parts(self, measured: Measured, left: Tensor | None, *, extremes: bool) -> Tensor:
        sharding = self._topology.sharding
        if sharding is None:
            raise RuntimeError("nothing is sharded here")
        full_PK = self._whole(measured.stats_QK, measured.numbers)
        own = full_PK[:, stats.SUM_OF_SQUARES].sum() if left is None else left
        shared_PK, measured.rows, left_square = sharding.share(full_PK, measured.rows[0], own)
        if extremes:
            sharding.share_extremes(shared_PK)
        else:
            shared_PK[:, stats.ABS_MAX :] = math.nan  # those of this rank's parts are not global ones
        measured.stats_QK = shared_PK
        if len(measured.numbers) < len(shared_PK):
            present = stats.numbers(tuple(n - 1 for n in measured.numbers), shared_PK.device)
            measured.stats_QK = shared_PK.index_select(0, present)
        measured.norm, measured.shared, measured.full = stats.total_norm(shared_PK), True, extremes
        self._settled = False
        return left_square.sqrt()

    def _share_norms(self, measured: Measured, left: Tensor) -> Tensor:
        group = self._topology.group
        if group is None or not self.may_judge():
            return left
        if self._shares_at_step:
            rows_WR = torch.zeros(dist.get_world_size(group), len(ROW), dtype=torch.float64, device=left.device)
            row = rows_WR[dist.get_rank(group)]
            row.copy_(measured.rows[0])
            row[ROW_NORM], row[ROW_LEFT] = _comparable(measured.norm), _comparable(left)
            row[ROW_SYNCED].fill_(float(measured.synced))
            dist.all_reduce(rows_WR, group=group)
            measured.rows, measured.shared, measured.synced = rows_WR, True, True
            measured.norm, left = rows_WR[:, ROW_NORM].max(), rows_WR[:, ROW_LEFT].max()
        elif self._agree and measured.synced:  # the hook's rows came by a collective: all ranks have them, or none
            both = _comparable(torch.stack((measured.norm, left)))
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
            measured.norm, left = both[0], both[1]
        return left

    def broken(self) -> Measured:
        """For a rank that could not measure: the others must not wait for it, so it shares this.

        Where numbers are shared, all ranks see a step to be skipped. Elsewhere the others decide by their own norm,
        which is not finite if the rows of all ranks say so, and this rank does the same.
        """
        self.settle()
        hook = self._topology.hook
        stats_PK = torch.zeros(
            len(self.watched.parameters), len(stats.STATISTICS), dtype=torch.float64, device=self.watched.device
        )
        stats_PK[:, stats.SUM_OF_SQUARES] = math.inf
        norm = stats.total_norm(stats_PK)
        row = torch.zeros(len(ROW), dtype=torch.float64, device=norm.device)
        rows, shared = row.unsqueeze(0), False
        if self._shares_at_step:
            row[ROW_ERRORS] = self.errors
        elif hook is not None and (found := hook.take_rows()) is not None:
            rows, shared = found, True
            if not self._agree:
                norm = torch.where(self._average_is_whole(found), torch.ones_like(norm), norm)
        return Measured(
            stats_QK=stats_PK,
            numbers=tuple(range(1, len(stats_PK) + 1)),
            elements=0,
            norm=norm,
            rows=rows,
            from_backward=True,
            shared=shared,
            synced=self._synced(),
            full=False,
            backwards=0,
            synced_backwards=0,
            leaves_out=hook is not None and hook.leaves_out,
            failed=True,
        )

    def _average_is_whole(self, rows: Tensor) -> Tensor:
        """0-dim: what the other ranks see of the averaged gradients, by a rank that could not measure them."""
        hook = self._topology.hook
        if hook is None or not hook.leaves_out:
            return whole(rows)
        return torch.stack([g.isfinite().all() for g in self.gradients()]).all()

    def settle(self) -> None:
        """This rank's part in adding up partial gradients, if it has not come to it."""
        sharding = self._topology.sharding
        if sharding is not None and not self._settled:
            sharding.settle(self.gradients())
            self._settled = True

    # --- parts -----------------------------------------------------------------------------------------------------

    def _measured(self, gradients: list[Tensor], *, extremes: bool, zeros: bool) -> Tensor:
        """stats_QK of this rank's parts; under sharding its sums are shares of the global ones."""
        sharding = self._topology.sharding
        if not gradients:
            return torch.zeros(0, len(stats.STATISTICS), dtype=torch.float64, device=self.watched.device)
        if sharding is None:
            return stats.measure(gradients, extremes=extremes, zeros=zeros)
        self._settled = False
        parts = sharding.settle(gradients)
        self._settled = True
        stats_QK = stats.measure(parts, extremes=extremes, zeros=zeros)
        sharding.weigh(stats_QK, gradients)
        return stats_QK

    def _whole(self, stats_QK: Tensor, numbers: tuple[int, ...]) -> Tensor:
        """stats_PK with zeros where there is no gradient: the same shape on every rank."""
        count = len(self.watched.parameters)
        if numbers == tuple(range(1, count + 1)):
            return stats_QK
        full_PK = torch.zeros(count, len(stats.STATISTICS), dtype=torch.float64, device=stats_QK.device)
        full_PK[:, stats.MINIMUM], full_PK[:, stats.MAXIMUM] = math.inf, -math.inf
        if numbers:
            full_PK.index_copy_(0, stats.numbers(tuple(n - 1 for n in numbers), stats_QK.device), stats_QK)
        return full_PK

    def _rows_of_backward(self) -> Tensor | None:
        """What was measured before the gradients were averaged: rows_WR, or this rank's own as [1, R]."""
        hook = self._topology.hook
        if hook is not None:
            return hook.take_rows()
        own: Tensor | None = None
        if self._topology.taken and self._backwards is not None:
            own = self._backwards.row()
            own = None if own is None else self._put_own(own.clone())
        elif self._sharded_backward is not None:
            own = self._sharded_backward.row(self.observed, self.errors)
        if own is None:
            return None
        # sync: only where gradients are offloaded to the host, which has waited for them already
        return own.unsqueeze(0).to(self.watched.device)

    def _own_row(self, stats_QK: Tensor, numbers: tuple[int, ...]) -> Tensor:
        """From the gradients that the optimizer gets: all there is without an all-reduce."""
        if not numbers:
            return torch.zeros(len(ROW), dtype=torch.float64, device=stats_QK.device)
        # Backward goes through the model from its end, so the first to break is the last in the model's order.
        order = stats.numbers(numbers[::-1], stats_QK.device)
        # A row that was not shared with the others carries no errors: ranks would withdraw at different steps.
        hook = self._topology.hook
        carries = hook is None or not hook.shares
        micro_step = self._backwards.last_micro_step if self._backwards is not None else 0
        row = rank_row(
            stats_QK.flip(0),
            order,
            micro_step=micro_step,
            observed=self.observed,
            errors=self.errors if carries else 0,
        )
        if self._backwards is not None and hook is None:
            earlier = self._backwards.row()
            if earlier is not None:  # of a micro-step before the last
                row[ROW_PARAMETER : ROW_MICRO_STEP + 1] = torch.where(
                    whole(earlier), row[ROW_PARAMETER : ROW_MICRO_STEP + 1], earlier[ROW_PARAMETER : ROW_MICRO_STEP + 1]
                )
        return row

    def _put_own(self, row: Tensor) -> Tensor:
        row[ROW_ERRORS].fill_(self.errors)
        put_losses(row, self.observed)
        return row

    def _synced(self) -> bool:
        """Whether gradients were averaged; from what no failure of ours can change, for ranks must agree on it."""
        known = self._topology
        if known.kind == "unrecognised":
            return False
        if known.taken:
            return self._averaged
        return known.hook is None or known.hook.synced

    def _backwards_taken(self) -> int:
        for watch in (self._sharded_backward, self._backwards):
            if watch is not None:
                return watch.taken
        hook = self._topology.hook
        return 1 if hook is None else hook.backwards_taken

    def _local(self) -> tuple[Tensor, tuple[int, ...]] | None:
        if self._topology.hook is not None:
            return self._topology.hook.local
        found = None if self._sharded_backward is None else self._sharded_backward.local()
        return None if found is None else (found[0].to(self.watched.device), found[1])

    def _take_synced_backwards(self) -> int:
        if self._topology.taken:
            averagings, self._averagings = self._averagings, 0
            return averagings
        if self._topology.hook is not None:
            return self._topology.hook.backwards_taken
        return 1 if self._sharded_backward is None else self._sharded_backward.synced_backwards

    def _ids_held(self) -> list[int]:
        return [id(p) for o in self.watched.optimizers for p in parameters_of(o)]

    def _watch_new_parameters(self) -> None:
        """An optimizer may be given other parameters later: a NaN there counts like any other."""
        held = self._ids_held()
        if held == self._held:
            return
        self._held = held
        averaged = self._topology.averaged
        known = set(map(id, self.watched.parameters))
        for optimizer in self.watched.optimizers:
            for parameter in parameters_of(optimizer):
                if id(parameter) in known:
                    continue
                if averaged is not None and id(parameter) not in averaged:
                    self._say("parameters that DDP does not average were added to an optimizer: they are not watched")
                    continue
                known.add(id(parameter))
                self.watched.parameters.append(parameter)
                self.watched.names.append(f"added[{len(self.watched.names)}]")
        for place, parameter in enumerate(self.watched.parameters):
            if id(parameter) not in set(held):  # an empty one keeps its number, so that names stay where they are
                self.watched.parameters[place] = torch.empty(0, device=parameter.device)
        if self._topology.hook is not None:
            self._topology.hook.number(self.watched.parameters)
        if self._backwards is not None:
            self._backwards.stop()
            self._backwards.start()


def _comparable(norm: Tensor) -> Tensor:
    """NaN as Inf: the largest of several is then the worst."""
    return torch.nan_to_num(norm, nan=math.inf, posinf=math.inf)
