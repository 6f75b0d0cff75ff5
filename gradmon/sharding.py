"""Gradients of which each rank holds a part: FSDP2, HSDP, tensor parallelism (DTensor).

*Global* sums come from one all-reduce of a vector over all ranks at step time: the sums of every gradient's own part,
and a row per rank. A gradient that several ranks hold alike (the replicas of HSDP, norms under tensor parallelism) is
divided by their number first; without that an HSDP norm would be too large by the root of the replica count.

*Local* statistics are of each rank's unsharded gradients before the reduce-scatter, where alone a rank can be blamed.
`FSDPParamGroup.post_backward` is the place: there FSDP2 itself collects the finished gradients of a group, also in
micro-steps that are not synchronised. (`set_custom_reduce_scatter` sees only a padded flat buffer without names,
already divided under fp16, not in those micro-steps, and not in torch before 2.9.)

Legend: P parameters, K statistics, W ranks, R columns of a rank's row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradmon import stats
from gradmon.rows import ROW, ROW_LEFT, Observed, first_broken, rank_row

#: Backwards of one step that are remembered.
_MOST_BACKWARDS = 64


def is_sharded(parameter: Tensor) -> bool:
    """True for a DTensor."""
    return hasattr(parameter, "device_mesh")


def replicas(tensor: Tensor, world_size: int) -> int:
    """How many ranks hold the same elements of `tensor`, once partial sums are settled."""
    if not is_sharded(tensor):
        return world_size
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    count = 1
    for size, placement in zip(mesh.shape, placements, strict=True):
        if placement.is_replicate() or placement.is_partial():  # what is left shards, in one way or another
            count *= int(size)
    return count


class Sharding:
    """How the parts of the parameters add up to the whole.

    Args:
        group: all ranks; every parameter's mesh holds each of them once.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)

    def share(self, stats_PK: Tensor, row: Tensor, left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The one all-reduce of a step; every rank must come, with vectors of the same length.

        Args:
            stats_PK: of this rank's own parts, its sums weighted; 0 where a parameter has no gradient.
            row: of this rank.
            left: this rank's weighted sum of squares of what the script's own clip has left.

        Returns:
            stats_PK with global sums (its maxima stay this rank's), rows_WR, and the global sum of squares left.
        """
        rows_WR = torch.zeros(self.world_size, len(ROW), dtype=torch.float64, device=row.device)
        rows_WR[self.rank] = row
        rows_WR[self.rank, ROW_LEFT] = left
        sums = stats_PK[:, : stats.SUMS]
        vector = torch.cat((rows_WR.flatten(), sums.flatten()))
        dist.all_reduce(vector, group=self.group)
        shared_PK = stats_PK.clone()
        rows_WR = vector[: rows_WR.numel()].view_as(rows_WR)
        shared_PK[:, : stats.SUMS] = vector[rows_WR.numel() :].view_as(sums)
        return shared_PK, rows_WR, rows_WR[:, ROW_LEFT].sum()

    def share_extremes(self, stats_PK: Tensor) -> None:
        """A second all-reduce, in steps with full statistics: maxima and minima over all parts, in place."""
        extremes = stats_PK[:, stats.ABS_MAX :].clone()
        lowest = stats.MINIMUM - stats.ABS_MAX
        extremes[:, lowest].neg_()
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.group)
        extremes[:, lowest].neg_()
        stats_PK[:, stats.ABS_MAX :] = extremes

    def weigh(self, stats_QK: Tensor, gradients: Sequence[Tensor]) -> None:
        """Make the sums this rank's share of the global ones: divided by the number of ranks that hold the same.

        The placements are the gradients' own, which may be others than their parameters'.
        """
        shares = tuple(1.0 / replicas(g, self.world_size) for g in gradients)
        weights = stats.constants(shares, stats_QK.device).unsqueeze(1)
        stats_QK[:, : stats.SUMS] *= weights

    def settle(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Own parts of `gradients`; those still to be added over the ranks of a mesh dimension are added first.

        Sequence parallelism leaves such *partial* gradients of replicated parameters behind. All of one kind are added
        in one collective; the gradients themselves are not touched.
        """
        parts: list[Tensor] = [g.to_local() if is_sharded(g) else g for g in gradients]  # type: ignore[attr-defined]
        kinds: dict[tuple[Any, int, torch.dtype], list[int]] = {}
        for i, gradient in enumerate(gradients):
            for dim, placement in enumerate(getattr(gradient, "placements", ())):
                if placement.is_partial():
                    kinds.setdefault((gradient.device_mesh, dim, parts[i].dtype), []).append(i)  # type: ignore[attr-defined]
        for (mesh, dim, _), members in kinds.items():
            together = torch.cat([parts[i].reshape(-1) for i in members])
            dist.all_reduce(together, group=mesh.get_group(dim))
            pieces = torch.split(together, [parts[i].numel() for i in members])
            for i, piece in zip(members, pieces, strict=True):
                parts[i] = piece.view_as(parts[i])
        return parts


class ShardedBackward:
    """Local statistics under FSDP2: of every group's unsharded gradients, when backward has finished them.

    Args:
        model: holds FSDP2 modules.
        parameters: the watched ones; gives the numbers used in rows.
        on_error: told of failures; backward goes on.
    """

    def __init__(
        self, model: nn.Module, parameters: Sequence[Tensor], on_error: Callable[[Exception], None], *, micro: bool
    ) -> None:
        self._groups = list(_param_groups(model))
        self._numbers = {id(p): n for n, p in enumerate(parameters, start=1)}
        self._on_error = on_error
        self._micro = micro
        self._wrapped: list[Any] = []
        self._fresh: list[dict[int, tuple[Tensor, tuple[int, ...]]]] = []
        self._taken = self._fresh
        self._reduced = 0
        self._last_reduced = False
        self._active = False
        self.synced_backwards = 0
        """Backwards of the gradients taken last that were reduced."""

    def start(self) -> None:
        """Listen from the next backward on."""
        self._active = True
        for number, group in enumerate(self._groups):
            original = group.post_backward

            @functools.wraps(original)
            def watched(*unused: Any, number: int = number, group: Any = group, original: Any = original) -> Any:
                try:
                    with torch.no_grad():
                        self._measure(number, group)
                except Exception as error:
                    self._on_error(error)
                return original(*unused)

            group.post_backward = watched
            self._wrapped.append((group, watched))

    def stop(self) -> None:
        """Leave FSDP2's own methods in place; where somebody has wrapped ours since, ours only passes through."""
        self._active = False
        for group, watched in self._wrapped:
            if vars(group).get("post_backward") is watched:
                del group.post_backward
        self._wrapped.clear()

    @property
    def taken(self) -> int:
        """Backwards of the gradients taken last, as far as they are measured."""
        return len(self._taken)

    def take(self) -> None:
        """The gradients that are there are measured now: later backwards are of the next step."""
        if self._fresh:
            self._taken, self._fresh = self._fresh, []
            self.synced_backwards, self._reduced = self._reduced, 0

    def forget(self) -> None:
        """The step of the gradients taken is over."""
        self._taken = []

    def row(self, observed: Observed, errors: int) -> Tensor | None:
        """Of the gradients taken, this rank's row_R: of the first backward that was broken, else of the last one."""
        rows = []
        for micro_step, parts in enumerate(self._taken, start=1):
            stats_PK = torch.cat([part for part, _ in parts.values()])
            order = tuple(n for _, numbers in parts.values() for n in numbers)
            order_P = stats.numbers(order, stats_PK.device)
            rows.append(rank_row(stats_PK, order_P, micro_step=micro_step, observed=observed, errors=errors))
        if not rows:
            return None
        return first_broken(torch.stack(rows), lasting=False) if len(rows) > 1 else rows[0]

    def local(self) -> tuple[Tensor, tuple[int, ...]] | None:
        """stats_PK of the newest backward, and its parameters' numbers."""
        if not self._taken:
            return None
        parts = self._taken[-1].values()
        return torch.cat([part for part, _ in parts]), tuple(n for _, numbers in parts for n in numbers)

    @property
    def came(self) -> bool:
        """True if a backward has run since gradients were taken."""
        return bool(self._fresh)

    def _nothing_left(self) -> bool:
        """Asked when the first group of a backward is done and before it is reduced, after one that was reduced."""
        return all(p.sharded_param.grad is None for group in self._groups for p in group.fsdp_params)

    def _measure(self, number: int, group: Any) -> None:
        if not self._active or not (group.reduce_grads or self._micro):
            return
        found = [(p, g) for p in group.fsdp_params if (g := _unsharded_gradient(p)) is not None]
        found = [(p, g) for p, g in found if id(p.sharded_param) in self._numbers]
        if not found:  # called a second time at the end of backward
            return
        if not self._fresh or number in self._fresh[-1]:  # a group comes once in a backward
            if self._last_reduced and self._nothing_left():  # the script has thrown it away since
                self._fresh, self._reduced = [], 0
            self._fresh = [*self._fresh[1 - _MOST_BACKWARDS :], {}]
            self._last_reduced = bool(group.reduce_grads)
            self._reduced += self._last_reduced
        numbers = tuple(self._numbers[id(p.sharded_param)] for p, _ in found)
        self._fresh[-1][number] = (stats.measure([g for _, g in found], extremes=False, zeros=False), numbers)


def _unsharded_gradient(parameter: Any) -> Tensor | None:
    """What this rank's backward has made of one parameter so far, as FSDP2 is about to reduce it."""
    if not hasattr(parameter, "_unsharded_param"):
        return None
    parameter.accumulate_unsharded_grad_if_needed()  # FSDP2 does so next; a second time does nothing
    gradient: Tensor | None = parameter.unsharded_accumulated_grad
    return parameter.unsharded_param.grad if gradient is None else gradient


def _param_groups(model: nn.Module) -> Iterator[Any]:
    """FSDP2's groups of parameters, each once; none where this torch keeps them elsewhere."""
    seen: set[int] = set()
    for module in model.modules():
        getter: Any = getattr(module, "_get_fsdp_state", None)
        state = None if getter is None else getter()
        several = getattr(state, "_fsdp_param_groups", None)
        for group in several if several is not None else [getattr(state, "_fsdp_param_group", None)]:
            usable = group is not None and hasattr(group, "post_backward") and hasattr(group, "fsdp_params")
            if usable and id(group) not in seen:
                seen.add(id(group))
                yield group


def describe(model: nn.Module, parameters: Sequence[Tensor], world_size: int) -> tuple[str, str]:
    """(kind, why gradmon can't add the parts up; empty if it can) of a model with DTensor parameters."""
    sharded = [p for p in parameters if is_sharded(p)]
    kind = _kind(list(_param_groups(model)))
    for parameter in sharded:
        mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
        if mesh.size() != world_size:
            why = (
                f"a device mesh holds {mesh.size()} of {world_size} ranks, and the others may hold other parameters "
                f"(pipeline or expert parallelism?); beside tensor parallelism, give every module a plan, so that each "
                f"parameter lies on the whole mesh"
            )
            return kind, why
        if any(placement.is_partial() for placement in parameter.placements):  # type: ignore[attr-defined]
            return kind, "a parameter is a partial sum (DTensor Partial)"
    return kind, ""


def _kind(groups: Sequence[Any]) -> str:
    if not groups:
        return "tensor_parallel"
    replicated = any(type(group.mesh_info).__name__ == "HSDPMeshInfo" for group in groups)
    tensor_parallel = any(getattr(p, "is_dtensor", False) for group in groups for p in group.fsdp_params)
    return ("hsdp" if replicated else "fsdp2") + ("+tp" if tensor_parallel else "")


def serves(group: dist.ProcessGroup, device: torch.device) -> bool:
    """True if the group has a backend for tensors on this device (an NCCL group has none for offloaded gradients)."""
    return any(known.type == device.type for known in group._device_types)
