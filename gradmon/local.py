"""Statistics of this rank's own gradients, before the all-reduce, from a DDP communication hook.

Only before the all-reduce can the rank that broke be told from the others. The hook measures every bucket, then does
what DDP does without a hook: multiply by 1/world_size, all-reduce. (DDP multiplies while it copies into the bucket;
the stock `allreduce_hook` divides, which is a different number for 3 ranks.) A hook that the script registers after
ours is called in its place.

From the last bucket's hook one small all-reduce shares a row per rank, on DDP's own process group. There every rank
calls it in the same order, also under `no_sync`, `Join`, unused parameters and static graphs; at step time it would
hang under `Join`. Only beside a hook of the script's the rows are shared at step time (`measuring`): such a hook may
start collectives from other threads, whose order against ours would be chance, and its gradients may differ by rank.

Asked to, the hook leaves out bad ranks (`leave_out`): one whose gradients in a bucket hold a NaN or Inf puts zeros into
that bucket, and the average is over the others. One more small all-reduce per bucket counts them.

DDP can't remove a hook. On detach ours turns into a plain pass-through, and the next attach finds it again.

Legend: W ranks, R columns of a rank's row (`ROW`), P parameters, K statistics.
"""

# No `from __future__ import annotations`: DDP compares the hook's annotations with types.

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import BuiltinCommHookType, GradBucket
from torch.nn.parallel import DistributedDataParallel

from gradmon import stats
from gradmon.backward import BackwardWatch
from gradmon.rows import (
    ROW,
    ROW_CHECKSUM,
    ROW_ERRORS,
    ROW_JOINED,
    ROW_SUM_OF_SQUARES,
    Observed,
    rank_row,
    share_rows,
    whole,
)
from gradmon.timing import Stamp

#: Backwards of one step whose rows are kept until it.
_MOST_BACKWARDS = 64

#: What an all-reduce promises: the one tensor it was given.
_Reduced = torch.futures.Future[list[Tensor]]

#: What `register_comm_hook` takes: (state, bucket) -> future of the averaged bucket.
CommHook = Callable[[Any, GradBucket], torch.futures.Future[Tensor]]


class HookTakenError(RuntimeError):
    """The DDP object has a communication hook that is not ours."""


class LocalHook:
    """The communication hook of one DDP object, for all attachments of its life."""

    def __init__(self, model: DistributedDataParallel) -> None:
        self.group = model.process_group
        self._model = weakref.ref(model)
        self.world_size = dist.get_world_size(self.group)
        self.rank = dist.get_rank(self.group)
        self.active = False
        self.errors = 0
        self.leave_out = False
        """Average over the ranks whose gradients in a bucket are finite. Each bucket then takes a second all-reduce, so
        this must be equal on all ranks, and change between the same two steps."""
        self.on_error: Callable[[Exception], None] = lambda _error: None
        self.backwards: BackwardWatch | None = None
        """Counts the backwards of a step and remembers which of them broke the gradients first."""
        self.observed = Observed()
        """This rank's losses; they go out with its row."""
        self.checksum: Tensor | None = None
        """Of this rank's weights, in steps in which they are compared."""
        self._inner: tuple[Any, CommHook] | None = None
        self._storages: dict[int, int] | None = None
        """Where each gradient lay before DDP looked at it, kept only if `_average` has to know."""
        self._numbers: dict[int, int] = {}
        self.local: tuple[Tensor, tuple[int, ...]] | None = None
        """stats_PK of this rank's own gradients in the newest synchronised backward, and its parameters' numbers."""
        self._parts: list[Tensor] = []
        self._arrived: list[int] = []
        self._orders: dict[tuple[int, ...], Tensor] = {}
        self._fresh: list[tuple[dist.Work | None, Tensor]] = []
        self._taken: Tensor | None = None
        self.ready: Stamp | None = None
        """When this rank's gradients were complete in the newest synchronised backward."""
        self.backwards_taken = 0
        """Synchronised backwards that the rows taken last stand for."""

    def installed(self, model: DistributedDataParallel) -> None:
        """DDP has taken the hook; both are for the life of the model."""
        if model.gradient_as_bucket_view and self.world_size & (self.world_size - 1):
            self._storages = {}
            for parameter in model.module.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._remember)

    def start(
        self, parameters: Sequence[Tensor], on_error: Callable[[Exception], None], *, leave_out: bool = False
    ) -> None:
        """Measure from the next backward on. `parameters` gives the numbers used in the rows."""
        self.number(parameters)
        self.leave_out = leave_out
        self.on_error = on_error
        self.errors = 0
        self._clear()
        self.active = True

    @property
    def shares(self) -> bool:
        """False beside a hook of the script's: `take_rows` then gives this rank's own row, for sharing at step time."""
        return self._inner is None

    @property
    def leaves_out(self) -> bool:
        """True if a bad rank is left out of the average now; never beside a hook of the script's, which averages."""
        return self.leave_out and self.active and self._inner is None

    @property
    def came(self) -> bool:
        """True if a backward has averaged gradients since rows were taken."""
        return bool(self._fresh)

    @property
    def synced(self) -> bool:
        """True if a backward since `forget` averaged its gradients."""
        return bool(self._fresh) or self._taken is not None

    def call(self, state: Any, hook: CommHook) -> None:
        """Let this hook of the script's average the buckets from now on.

        Raises:
            RuntimeError: there is one already, as DDP would say.
        """
        if self._inner is not None:
            raise RuntimeError("register_comm_hook or register_builtin_comm_hook can only be called once.")
        self._inner = (state, hook)

    def stop(self) -> None:
        """Become a pass-through. To be called on all ranks between the same two steps."""
        self.active = self.leave_out = False
        self.on_error = lambda _error: None  # whatever it held on to must not live as long as the model
        self.backwards = self.checksum = None
        self.observed = Observed()
        self._clear()

    def _clear(self) -> None:
        self._parts, self._arrived = [], []
        self._fresh, self._taken = [], None
        self.local = self.ready = None

    def number(self, parameters: Sequence[Tensor]) -> None:
        """Give the parameters these numbers from now on; earlier ones must keep theirs."""
        self._numbers = {id(p): number for number, p in enumerate(parameters, start=1)}

    def __reduce__(self) -> tuple[object, tuple[()]]:
        # DDP keeps its hook in `_comm_hooks`; a copied or loaded DDP has a reducer of its own, without any hook.
        return object, ()

    def take_rows(self) -> Tensor | None:
        """rows_WR, equal on all ranks, of the synchronised backwards since `forget`; None if there were none.

        Where the hook does not share (`shares`), the one row is this rank's own.

        Of several backwards the first that was broken counts: each all-reduce hands a NaN on to all ranks, so later
        rows would blame everybody. Where bad ranks are left out, the first of each rank counts. The device's stream
        waits for the all-reduce, the host does not (gloo's does: its tensors live on the host).
        """
        if self._fresh:
            for work, _ in self._fresh:
                if work is not None:
                    work.wait()
            self.backwards_taken = len(self._fresh)
            last_WR = rows_WR = self._fresh[-1][1]
            for _, earlier_WR in reversed(self._fresh[:-1]):
                # where the last is whole, what was broken before has been thrown away, as GradScaler does
                keep = whole(last_WR).logical_or(whole(earlier_WR))
                if self.leaves_out:
                    # the average was whole if any rank was: nothing has spread, nothing was thrown away
                    whole_W = earlier_WR[:, ROW_SUM_OF_SQUARES].isfinite()
                    keep = torch.where(whole_W.any(), whole_W, keep).unsqueeze(1)
                rows_WR = torch.where(keep, rows_WR, earlier_WR)
            self._fresh, self._taken = [], rows_WR
        return self._taken

    def forget(self) -> None:
        """The step is over: rows that were taken are no longer of the gradients to come."""
        self._taken = self.ready = None
        if not self._fresh:
            self.local = None

    def forward(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """What DDP calls for every bucket."""
        stats_PK: Tensor | None = None
        row: Tensor | None = None
        if self.active:
            try:
                stats_PK = self._measure(bucket)
                if bucket.is_last():
                    row = self._row()
                    self.ready = Stamp(bucket.buffer().device)
            except Exception as error:
                self._failed(error)
        if self._inner is not None:
            if self.active and bucket.is_last():
                own = self._no_row(bucket.buffer().device) if row is None else row
                self._keep(None, own.unsqueeze(0))
            state, hook = self._inner
            return hook(state, bucket)
        buffer = self._average(bucket)
        weigh = self._count_healthy(buffer, stats_PK) if self.leaves_out else _first_tensor
        reduced = dist.all_reduce(buffer, group=self.group, async_op=True).get_future()
        if self.active and bucket.is_last():
            self._share(row, buffer.device)
        return cast("torch.futures.Future[Tensor]", reduced.then(weigh))

    @torch.no_grad()
    def _count_healthy(self, buffer: Tensor, stats_PK: Tensor | None) -> Callable[[_Reduced], Tensor]:
        """Put zeros in place of gradients that are not finite, and start counting the ranks where they are.

        Returns:
            What makes the reduced bucket the average over the healthy ranks: not finite if there are none, and bit
            for bit what it was if there is no other.
        """
        values = _values(buffer)
        bad = self._is_bad(values, stats_PK)
        if not stats.reads_are_free(values.device):
            values.masked_fill_(bad, 0)
        elif bad:
            values.zero_()
        exact = torch.float64 if values.dtype in (torch.float64, torch.complex128) else torch.float32
        active_healthy = torch.ones(2, dtype=exact, device=values.device)
        active_healthy[1] = bad.logical_not()
        if self._has_joined():
            active_healthy.zero_()
        # Before the bucket's own all-reduce: whoever has the bucket need not wait for the count (`_weighing`).
        counted = dist.all_reduce(active_healthy, group=self.group, async_op=True).get_future()
        return _weighing(cast("_Reduced", counted))

    def _is_bad(self, values: Tensor, stats_PK: Tensor | None) -> Tensor:
        """0-dim: True if this rank's gradients in a bucket are not all finite, by the test that its row is read with.

        Parameters that no optimizer of ours steps do not count: they are not measured, and broken they break nothing
        else. A rank that could not measure looks at the whole bucket. One that can't even do that contributes what it
        has: the average is then judged as if nobody were left out.
        """
        try:
            if stats_PK is None:
                return values.isfinite().all().logical_not_()
            return stats_PK[:, stats.SUM_OF_SQUARES].sum().isfinite().logical_not_()
        except Exception as error:
            self._failed(error)
            return torch.zeros((), dtype=torch.bool, device=values.device)

    def _has_joined(self) -> bool:
        """True on a rank that has run out of data inside `Join`: DDP then calls with zeros, and outside of backward.

        Its zeros say nothing about the others' health, so it takes no part in the count.
        """
        model = self._model()
        return model is not None and bool(model._join_config.enable) and torch._C._current_graph_task_id() < 0

    def _average(self, bucket: GradBucket) -> Tensor:
        """Bit-identical to DDP without a hook.

        DDP multiplies by 1/world_size while it copies a gradient into the bucket, and divides a sparse one and one that
        lies there already (`gradient_as_bucket_view` with static gradient memory): other bits if that is no power of
        two.
        """
        buffer = bucket.buffer()
        if buffer.layout != torch.strided:
            return buffer.div_(self.world_size)
        if self._storages is None:
            return buffer.mul_(1.0 / self.world_size)
        here = buffer.untyped_storage().data_ptr()
        for parameter, view in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if self._storages.get(id(parameter)) == here:
                view.div_(self.world_size)
            else:
                view.mul_(1.0 / self.world_size)
        return buffer

    def _remember(self, parameter: Tensor) -> None:
        if self._storages is not None and parameter.grad is not None and parameter.grad.layout == torch.strided:
            self._storages[id(parameter)] = parameter.grad.untyped_storage().data_ptr()

    @torch.no_grad()
    def _measure(self, bucket: GradBucket) -> Tensor:
        """stats_PK of the bucket's parameters that have a number."""
        if bucket.index() == 0:
            self._parts, self._arrived = [], []
        numbers = [self._numbers.get(id(p), 0) for p in bucket.parameters()]
        # DDP averages parameters that no optimizer uses, too; they have no number and are not ours to judge.
        gradients = [g for g, number in zip(_gradients(bucket), numbers, strict=True) if number]
        stats_PK = stats.measure(gradients, extremes=False, zeros=False)
        if not gradients:
            stats_PK = stats_PK.to(bucket.buffer().device)
        self._parts.append(stats_PK)
        self._arrived.extend(filter(None, numbers))
        return stats_PK

    @torch.no_grad()
    def _row(self) -> Tensor:
        """This rank's row, once all buckets are measured."""
        stats_PK = torch.cat(self._parts)
        arrived = tuple(self._arrived)
        order_P = self._orders.get(arrived)
        if order_P is None:  # the order changes once, when DDP rebuilds its buckets
            order_P = self._orders[arrived] = torch.tensor(arrived, device=stats_PK.device)
        self.local = (stats_PK, arrived)
        micro_step = 0 if self.backwards is None else self.backwards.count + 1
        row = rank_row(stats_PK, order_P, micro_step=micro_step, observed=self.observed, errors=self.errors)
        if self._has_joined():
            row[ROW_JOINED].fill_(1)
        elif self.checksum is not None:
            row[ROW_CHECKSUM] = self.checksum
        return row if self.backwards is None else self.backwards.blame(row, len(self._fresh))

    def _share(self, row: Tensor | None, device: torch.device) -> None:
        """Every rank must come here in every synchronised backward, whatever went wrong before."""
        own = self._no_row(device) if row is None else row
        work, rows_WR = share_rows(own, self.rank, self.world_size, self.group)
        self._keep(work, rows_WR)

    def _keep(self, work: dist.Work | None, rows: Tensor) -> None:
        thrown_away = self.backwards is not None and self.backwards.count == 0
        self._fresh = [*([] if thrown_away else self._fresh[1 - _MOST_BACKWARDS :]), (work, rows)]

    def _no_row(self, device: torch.device) -> Tensor:
        row = torch.zeros(len(ROW), dtype=torch.float64, device=device)
        row[ROW_ERRORS] = self.errors
        return row

    def _failed(self, error: Exception) -> None:
        self.errors += 1
        self.on_error(error)


def _first_tensor(reduced: _Reduced) -> Tensor:
    return reduced.value()[0]


def _weighing(counted: _Reduced) -> Callable[[_Reduced], Tensor]:
    """What turns a reduced bucket from an average over all ranks into one over the healthy ranks."""

    def weigh(reduced: _Reduced) -> Tensor:
        buffer = reduced.value()[0]
        # The count was started before the bucket on every rank, and a process group starts its collectives in order:
        # as the bucket is here, so is the count, or another of gloo's threads is about to have it. With NCCL this puts
        # an event into the stream that this runs on, as it did for the bucket; the host waits for nothing.
        active_healthy = counted.wait()[0]
        values = _values(buffer)
        if not stats.reads_are_free(values.device):
            # In place, since this stream is one of many and an allocation would stay with it. One dimension, so that
            # half-precision values are multiplied in float32. Nobody healthy: zeros times infinity.
            values.mul_(active_healthy[:1].div_(active_healthy[1:]))
            return buffer
        active, healthy = active_healthy.tolist()
        if healthy < active:
            values.mul_(active / healthy if healthy else math.nan)
        return buffer

    return weigh


def _values(tensor: Tensor) -> Tensor:
    """All that can differ from zero, to be changed in place."""
    return tensor if tensor.layout == torch.strided else tensor._values()


def _gradients(bucket: GradBucket) -> list[Tensor]:
    """In the order of the bucket's parameters; a sparse gradient has a bucket of its own."""
    buffer = bucket.buffer()
    return bucket.gradients() if buffer.layout == torch.strided else [buffer]


def _forward(state: LocalHook, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    return state.forward(bucket)


_hooks: "weakref.WeakKeyDictionary[DistributedDataParallel, LocalHook]" = weakref.WeakKeyDictionary()


def local_hook(model: DistributedDataParallel) -> LocalHook:
    """The hook of `model`, registered now if it was not before.

    Raises:
        HookTakenError: a hook of somebody else's is registered.
    """
    hook = _hooks.get(model)
    if hook is None:
        hook = LocalHook(model)
        try:
            model.register_comm_hook(hook, _forward)
        except RuntimeError as error:
            raise HookTakenError(str(error).splitlines()[0]) from None
        hook.installed(model)
        _hooks[model] = hook
    return hook


class RegistrationWatch:
    """From `start` to `stop`, hooks that scripts register on a DDP object of ours are called by our hook.

    DDP takes one hook only, so without this a registration after `attach` would be an error.
    """

    def __init__(self) -> None:
        self._original = DistributedDataParallel.register_comm_hook
        self._builtin = DistributedDataParallel._register_builtin_comm_hook
        self._wrappers: tuple[Any, Any] | None = None

    def start(self, on_registration: Callable[[], None]) -> None:
        """Begin to listen; `on_registration` is called after each one."""
        original, builtin = self._original, self._builtin = (
            DistributedDataParallel.register_comm_hook,
            DistributedDataParallel._register_builtin_comm_hook,
        )

        def register_comm_hook(model: DistributedDataParallel, state: object, hook: Any) -> None:
            ours = _hooks.get(model)
            if ours is None:
                original(model, state, hook)
                return
            model._check_comm_hook(hook)  # type: ignore[no-untyped-call]
            ours.call(state, hook)
            on_registration()

        def register_builtin(model: DistributedDataParallel, kind: BuiltinCommHookType) -> None:
            if _hooks.get(model) is None:
                builtin(model, kind)  # type: ignore[no-untyped-call]
                return
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

            same = {"ALLREDUCE": default_hooks.allreduce_hook, "FP16_COMPRESS": default_hooks.fp16_compress_hook}
            register_comm_hook(model, None, same[kind.name])

        self._wrappers = (register_comm_hook, register_builtin)
        DistributedDataParallel.register_comm_hook = register_comm_hook  # type: ignore[method-assign, assignment]
        DistributedDataParallel._register_builtin_comm_hook = register_builtin  # type: ignore[method-assign]

    def stop(self) -> None:
        """Put DDP's own methods back, unless somebody has wrapped ours since."""
        if self._wrappers is None:
            return
        ours, ours_builtin = self._wrappers
        self._wrappers = None
        if DistributedDataParallel.register_comm_hook is ours:
            DistributedDataParallel.register_comm_hook = self._original  # type: ignore[method-assign]
        if DistributedDataParallel._register_builtin_comm_hook is ours_builtin:
            DistributedDataParallel._register_builtin_comm_hook = self._builtin  # type: ignore[method-assign]
