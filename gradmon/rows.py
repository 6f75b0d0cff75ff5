"""One row of numbers per rank and step: what each rank tells the others about its own gradients.

Legend: W ranks, R columns (`ROW`), P parameters, K statistics, M backwards of a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gradmon import stats

#: `parameter` is the number, from 1, of the first one that is not finite, in the order backward came to them; where all
#: are finite, of the one with the largest norm. `micro_step` is the backward, from 1, after which that was so. `losses`
#: is 1 if `loss` was observed, `validation` is the newest validation loss and `validations` how many there were.
#: `checksum` is that of the rank's weights where they are to be compared, else 0. `joined` is 1 for a rank that has run
#: out of data inside `Join` and only takes part in the others' collectives. The last three are filled only where rows
#: travel at step time (see `measuring`): there ranks may differ in the norm, in what the script's clip has left of it,
#: and in whether gradients were averaged.
ROW = (
    "sum_of_squares", "nan_count", "inf_count", "parameter", "micro_step", "loss", "losses", "validation",
    "validations", "errors", "checksum", "joined", "norm", "left", "synced",
)  # fmt: skip
(
    ROW_SUM_OF_SQUARES, ROW_NAN, ROW_INF, ROW_PARAMETER, ROW_MICRO_STEP, ROW_LOSS, ROW_LOSSES, ROW_VALIDATION,
    ROW_VALIDATIONS, ROW_ERRORS, ROW_CHECKSUM, ROW_JOINED, ROW_NORM, ROW_LEFT, ROW_SYNCED,
) = range(len(ROW))  # fmt: skip


@dataclass(slots=True)
class Observed:
    """What this rank was told of its losses last; each is 0-dim if a tensor."""

    loss: Tensor | float | None = None
    validation_loss: Tensor | float | None = None
    validations: int = 0
    """Validation losses so far."""
    late: bool = False
    """True if the newest loss came when this step's rows had been made: it travels with the next one's."""


_NOTHING = Observed()


def rank_row(
    stats_PK: Tensor, order_P: Tensor, *, micro_step: int = 0, observed: Observed = _NOTHING, errors: int = 0
) -> Tensor:
    """Sum up one rank's statistics.

    Args:
        stats_PK: in the order in which backward finished the gradients.
        order_P: for each row the parameter's number, from 1.
        micro_step: number of the backward, from 1; 0 if unknown.
        observed: losses so far.
        errors: failures of gradmon itself on this rank so far.

    Returns:
        row_R, float64, on the device of `stats_PK`; nothing is read back.
    """
    row = torch.zeros(len(ROW), dtype=torch.float64, device=stats_PK.device)
    row[: ROW_INF + 1] = stats_PK[:, : ROW_INF + 1].sum(0)
    squares_P = stats_PK[:, stats.SUM_OF_SQUARES]
    # argmax takes the first of equals, so broken ones count as infinite alike
    place = torch.nan_to_num(squares_P, nan=math.inf, posinf=math.inf).argmax()
    row[ROW_PARAMETER] = order_P.take(place)  # take, not order_P[place]: an index that is a tensor is read on the host
    row[ROW_MICRO_STEP].fill_(micro_step)
    put_losses(row, observed)
    if errors:
        row[ROW_ERRORS].fill_(errors)
    return row


def put_losses(row: Tensor, observed: Observed) -> None:
    """Write them into a row_R; one that can't be had there without waiting is left out."""
    if _put(row, ROW_LOSS, observed.loss):
        row[ROW_LOSSES].fill_(1)
    if _put(row, ROW_VALIDATION, observed.validation_loss):
        row[ROW_VALIDATIONS].fill_(observed.validations)


def _put(row: Tensor, column: int, loss: Tensor | float | None) -> bool:
    if isinstance(loss, Tensor) and loss.device.type == row.device.type:
        row[column] = loss
    elif loss is not None and (not isinstance(loss, Tensor) or stats.reads_are_free(loss.device)):
        row[column].fill_(float(loss))
    else:
        return False
    return True


def share_rows(row: Tensor, rank: int, world_size: int, group: dist.ProcessGroup) -> tuple[dist.Work, Tensor]:
    """Start the all-reduce after which rows_WR is the same on every rank."""
    rows_WR = torch.zeros(world_size, len(ROW), dtype=torch.float64, device=row.device)
    rows_WR[rank] = row
    return dist.all_reduce(rows_WR, group=group, async_op=True), rows_WR


def whole(rows: Tensor) -> Tensor:
    """0-dim: True if no rank's gradients were broken. For one row_R or rows_WR."""
    finite: Tensor = rows[..., ROW_SUM_OF_SQUARES].sum().isfinite()
    return finite


def first_broken(rows_MR: Tensor, *, lasting: bool) -> Tensor:
    """row_R: of the backward that broke one rank's gradients, or of the last one. Nothing is read back.

    Args:
        rows_MR: in the order of the backwards.
        lasting: True where gradients accumulate and so stay broken: what was whole after it had been broken was thrown
            away in between. False where each backward is reduced by itself: then the first counts.
    """
    broken_M = rows_MR[:, ROW_SUM_OF_SQUARES].isfinite().logical_not_()
    if lasting:
        run = broken_M.flip(0).long().cumprod(0).sum().clamp_(min=1)  # how many at the end are broken
        return rows_MR.index_select(0, (len(rows_MR) - run).view(1))[0]
    broken_M[-1] = True  # argmax takes the first: the last where none was broken
    return rows_MR.index_select(0, broken_M.int().argmax().view(1))[0]
