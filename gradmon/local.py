"""Statistics of this rank's own gradients, before the all-reduce, from a DDP communication hook.

Only before the all-reduce can the rank that broke be told from the others. The hook measures every bucket, then does
what DDP does without a hook: multiply by 1/world_size, all-reduce. (DDP multiplies while it copies into the bucket;
the stock `allreduce_hook` divides, which is a different number for 3 ranks.)

From the last bucket's hook one small all-reduce shares a row per rank, on DDP's own process group. There every rank
calls it in the same order, also under `no_sync`, `Join`, unused parameters and static graphs; at step time it would
hang under `Join`.

DDP can't remove a hook. On detach ours turns into a plain pass-through, and the next attach finds it again.

Legend: W ranks, R columns of a rank's row (`ROW`), P parameters, K statistics.
"""

# No `from __future__ import annotations`: DDP compares the hook's annotations with types.

import math
import weakref
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from gradmon import stats

#: What each rank tells the others about its own gradients in a step. `parameter` is the number, from 1, of the first
#: one that is not finite, in the order backward came to them; where all are finite, of the one with the largest norm.
ROW = ("sum_of_squares", "nan_count", "inf_count", "parameter", "errors")
ROW_SUM_OF_SQUARES, ROW_NAN, ROW_INF, ROW_PARAMETER, ROW_ERRORS = range(len(ROW))


#: Backwards of one step whose rows are kept until it.
_MOST_BACKWARDS = 64


class HookTakenError(RuntimeError):
    """The DDP object has a communication hook that is not ours."""


def rank_row(stats_PK: Tensor, order_P: Tensor, errors: int = 0) -> Tensor:
    """Sum up one rank's statistics.

    Args:
        stats_PK: in the order in which backward finished the gradients.
        order_P: for each row the parameter's number, from 1.
        errors: failures of gradmon itself on this rank so far.

    Returns:
        row_R, float64, on the device of `stats_PK`; nothing is read back.
    """
    squares_P = stats_PK[:, stats.SUM_OF_SQUARES]
    # argmax takes the first of equals, so broken ones count as infinite alike
    place = torch.nan_to_num(squares_P, nan=math.inf, posinf=math.inf).argmax()
    # take, not order_P[place]: an index that is a tensor is read on the host
    rest = torch.stack((order_P.take(place).double(), torch.full_like(squares_P[0], errors)))
    return torch.cat((stats_PK.sum(0), rest))


class LocalHook:
    """The communication hook of one DDP object, for all attachments of its life."""

    def __init__(self, model: DistributedDataParallel) -> None:
        self.group = model.process_group
        self.world_size = dist.get_world_size(self.group)
        self.rank = dist.get_rank(self.group)
        self.active = False
        self.errors = 0
        self.on_error: Callable[[Exception], None] = lambda _error: None
        self._numbers: dict[int, int] = {}
        self._parts: list[Tensor] = []
        self._arrived: list[int] = []
        self._orders: dict[tuple[int, ...], Tensor] = {}
        self._fresh: list[tuple[dist.Work, Tensor]] = []
        self._taken: Tensor | None = None
        self._model = weakref.ref(model)

    def start(self, parameters: Sequence[Tensor], on_error: Callable[[Exception], None]) -> None:
        """Measure from the next backward on. `parameters` gives the numbers used in the rows."""
        self.number(parameters)
        self.on_error = on_error
        self.errors = 0
        self._clear()
        self.active = True

    def stop(self) -> None:
        """Become a pass-through. To be called on all ranks between the same two steps."""
        self.active = False
        self._clear()

    def _clear(self) -> None:
        self._parts, self._arrived = [], []
        self._fresh, self._taken = [], None

    def number(self, parameters: Sequence[Tensor]) -> None:
        """Give the parameters these numbers from now on; earlier ones must keep theirs."""
        self._numbers = {id(p): number for number, p in enumerate(parameters, start=1)}

    def __reduce__(self) -> tuple[object, tuple[()]]:
        # DDP keeps its hook in `_comm_hooks`; a copied or loaded DDP has a reducer of its own, without any hook.
        return object, ()

    def joining(self) -> bool:
        """True inside `model.join()`, where ranks run out of data one by one."""
        model = self._model()
        return model is not None and bool(model._join_config.enable)

    def divides_by_those_left(self) -> bool:
        """True inside `model.join(divide_by_initial_world_size=False)`, which a communication hook can't follow."""
        model = self._model()
        return self.joining() and not getattr(model, "_divide_by_initial_world_size", True)

    def take_rows(self) -> Tensor | None:
        """rows_WR, equal on all ranks, of the synchronised backwards since `forget`; None if there were none.

        Of several backwards the first that was broken counts: each all-reduce hands a NaN on to all ranks, so later
        rows would blame everybody. The device's stream waits for the all-reduce, the host does not (gloo's does: its
        tensors live on the host).
        """
        if self._fresh:
            for work, _ in self._fresh:
                work.wait()
            last_WR = rows_WR = self._fresh[-1][1]
            for _, earlier_WR in reversed(self._fresh[:-1]):
                # where the last is whole, what was broken before has been thrown away, as GradScaler does
                keep = _is_whole(last_WR).logical_or(_is_whole(earlier_WR))
                rows_WR = torch.where(keep, rows_WR, earlier_WR)
            self._fresh, self._taken = [], rows_WR
        return self._taken

    def forget(self) -> None:
        """The step is over: rows that were taken are no longer of the gradients to come."""
        self._taken = None

    def forward(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """What DDP calls for every bucket."""
        row: Tensor | None = None
        if self.active:
            try:
                row = self._measure(bucket)
            except Exception as error:
                self._failed(error)
        # bit-identical to DDP without a hook
        buffer = bucket.buffer().mul_(1.0 / self.world_size)
        reduced = dist.all_reduce(buffer, group=self.group, async_op=True).get_future()
        if self.active and bucket.is_last():
            self._share(row, buffer.device)
        return cast("torch.futures.Future[Tensor]", reduced.then(_first_tensor))

    @torch.no_grad()
    def _measure(self, bucket: GradBucket) -> Tensor | None:
        """Measure a bucket; at the last one, the rank's row."""
        if bucket.index() == 0:
            self._parts, self._arrived = [], []
        numbers = [self._numbers.get(id(p), 0) for p in bucket.parameters()]
        # DDP averages parameters that no optimizer uses, too; they have no number and are not ours to judge.
        whole = bucket.buffer()
        views = bucket.gradients() if whole.layout == torch.strided else [whole]  # a sparse gradient has its own bucket
        gradients = [g for g, number in zip(views, numbers, strict=True) if number]
        self._parts.append(stats.measure(gradients))
        self._arrived.extend(filter(None, numbers))
        if not bucket.is_last():
            return None
        stats_PK = torch.cat(self._parts)
        arrived = tuple(self._arrived)
        order_P = self._orders.get(arrived)
        if order_P is None:  # the order changes once, when DDP rebuilds its buckets
            order_P = self._orders[arrived] = torch.tensor(arrived, device=stats_PK.device)
        return rank_row(stats_PK, order_P, self.errors)

    def _share(self, row: Tensor | None, device: torch.device) -> None:
        """Every rank must come here in every synchronised backward, whatever went wrong before."""
        rows_WR = torch.zeros(self.world_size, len(ROW), dtype=torch.float64, device=device)
        if row is not None:
            rows_WR[self.rank] = row
        else:
            rows_WR[self.rank, ROW_ERRORS] = self.errors
        work = dist.all_reduce(rows_WR, group=self.group, async_op=True)
        self._fresh = [*self._fresh[-_MOST_BACKWARDS:], (work, rows_WR)]

    def _failed(self, error: Exception) -> None:
        self.errors += 1
        self.on_error(error)


def _is_whole(rows_WR: Tensor) -> Tensor:
    return rows_WR[:, ROW_SUM_OF_SQUARES].sum().isfinite()


def _first_tensor(future: torch.futures.Future[list[Tensor]]) -> Tensor:
    return future.value()[0]


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
        _hooks[model] = hook
    return hook
