"""Training steps that break, and whose bundle `gradmon replay` must explain: a real forward and backward of each."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import Broken

from gradmon.config import Config, IncidentConfig
from gradmon.diagnose.bundle import load_bundle
from gradmon.diagnose.capture import Capture
from gradmon.diagnose.replay import replay
from gradmon.record import RankIdentity, StepRecord

STEP = 7


def identity(**changed: Any) -> RankIdentity:
    known: dict[str, Any] = {
        "run": "zoo",
        "instance": "one",
        "attempt": 0,
        "rank": 0,
        "local_rank": 0,
        "world_size": 1,
        "host": "here",
        "pid": 1,
        "device": "cpu",
        "mode": "guard",
        "topology": "single",
        "script": "train.py",
        "version": "0",
    }
    return RankIdentity(**{**known, "started_seconds": 0.0, **changed})


def record(**changed: Any) -> StepRecord:
    known: dict[str, Any] = {
        "step": STEP,
        "wall_seconds": 0.0,
        "step_seconds": None,
        "grad_norm": math.nan,
        "grad_norm_applied": 0.0,
        "grad_norm_limit": None,
        "local_grad_norm": None,
        "nan_count": 1,
        "inf_count": 0,
        "local_nan_count": 1,
        "local_inf_count": 0,
        "action": "skip",
        "reason": "nonfinite",
        "applied": True,
        "culprit_rank": 0,
        "parameter": None,
        "learning_rate": 0.1,
        "learning_rate_scale": 1.0,
    }
    return StepRecord(**{**known, **changed})


@contextlib.contextmanager
def guarded(_part: str) -> Iterator[None]:
    yield


def capture_of(model: nn.Module, **settings: Any) -> Capture:
    return Capture(model, torch.device("cpu"), IncidentConfig(**{"weights": True, **settings}), guarded)


def norm_of(model: nn.Module) -> float:
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return float(torch.cat(grads).norm())


def incident(
    folder: Path, model: nn.Module, loss_of: Callable[[nn.Module], Tensor], usual: float | None = None, **changed: Any
) -> Path:
    """Train a step that breaks, and save its bundle. With `usual`, the norm of a healthy step, it must be a spike."""
    capture = capture_of(model)
    loss_of(model).backward()
    capture.step_ended(STEP)
    norm = norm_of(model)
    if usual is None:
        assert not math.isfinite(norm), f"this step is to break (norm {norm})"
    else:
        assert math.isfinite(norm) and norm > 8 * usual, f"this step is to be a spike ({norm} against {usual})"
        changed |= {"reason": "spike", "action": "rescale", "applied": False, "grad_norm_limit": 4 * usual}
        changed |= {"nan_count": 0, "local_nan_count": 0}
    seen = record(grad_norm=norm, local_grad_norm=norm, **changed)
    draft = capture.save(seen, identity=identity(), settings=Config().to_dict(), journal=folder / "rank-00000.db")
    capture.stop()
    assert draft is not None
    return draft.write()


def explained(
    make: Callable[[], nn.Module], call: Callable[..., Any], loss: Callable[..., Tensor] | None = None
) -> Callable[[Path], str]:
    """Break it, and replay the file with a model that was made anew."""

    def find(folder: Path) -> str:
        torch.manual_seed(0)
        path = call(folder, make())
        torch.manual_seed(99)
        return replay(load_bundle(path), make(), loss).text()

    return find


class LogOfSoftmax(nn.Module):
    """Cross entropy by hand: a probability that is rounded to 0 has no log."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        probabilities = self.head(x).softmax(-1)
        return -(F.one_hot(target, 5) * probabilities.log()).sum(-1).mean()


def log_of_zero(folder: Path, model: nn.Module) -> Path:
    x, target = torch.randn(4, 8), torch.tensor([0, 1, 2, 3])
    assert model(x, target).isfinite()
    return incident(folder, model, lambda m: m(1000 * x, target))


class MaskedMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.pool = Pool()
        self.head = nn.Linear(6, 1)

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        pooled = self.pool(self.embed(tokens), mask)
        return {"loss": self.head(pooled).square().mean(), "pooled": pooled}


class Pool(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weights = mask.unsqueeze(-1).float()
        return (x * weights).sum(1) / weights.sum(1)


def empty_mask(folder: Path, model: nn.Module) -> Path:
    tokens, mask = torch.randint(10, (4, 5)), torch.ones(4, 5, dtype=torch.bool)
    assert model(tokens, mask)["loss"].isfinite()
    mask[2] = False
    return incident(folder, model, lambda m: m(tokens, mask=mask)["loss"])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 8**0.5
        scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
        return scores.softmax(-1) @ self.v(x)


def all_masked(folder: Path, model: nn.Module) -> Path:
    x, mask = torch.randn(3, 4, 8), torch.ones(3, 4, dtype=torch.bool)
    mask[0, 2:] = False
    assert model(x, mask).isfinite().all(), "a mask's -inf alone is healthy"
    mask[1] = False
    return incident(folder, model, lambda m: square(m(x, mask)))


def square(output: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return output.float().square().mean()


class HalfSoftmax(nn.Module):
    """A softmax by hand in fp16, without taking off the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        grown = torch.exp(self.scores(x))
        return grown / grown.sum(-1, keepdim=True)


def fp16_overflow(folder: Path, model: nn.Module) -> Path:
    model.half()
    x = torch.randn(4, 4).half()
    assert model(x).isfinite().all()
    assert math.exp(12) > torch.finfo(torch.float16).max
    with torch.no_grad():
        model.scores.bias[1] = 12.0  # type: ignore[union-attr, index]
    return incident(folder, model, lambda m: square(m(x)))


class Distance(nn.Module):
    """A norm by hand: at 0 the forward is fine and the slope is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 3, bias=False)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        gap = self.encoder(left) - self.encoder(right)
        return gap.pow(2).sum(-1).sqrt().mean()


def sqrt_at_zero(folder: Path, model: nn.Module) -> Path:
    left, right = torch.randn(4, 6), torch.randn(4, 6)
    right[1] = left[1]
    assert model(left, right).isfinite(), "only the backward breaks"
    return incident(folder, model, lambda m: m(left, right), parameter="encoder.weight")


class WhereLog(nn.Module):
    """torch.where hides what log gives at 0, not the slope there."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        open_ = self.gate(x).sigmoid() * keep
        return torch.where(keep > 0, open_.log(), 0.0).mean()


def where_log(folder: Path, model: nn.Module) -> Path:
    x, keep = torch.randn(8, 4), torch.ones(8, 4)
    keep[3] = 0.0
    assert model(x, keep).isfinite()
    return incident(folder, model, lambda m: m(x, keep))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 1))


def nan_sample(folder: Path, model: nn.Module) -> Path:
    x = torch.randn(8, 6)
    x[3, 2] = math.nan
    return incident(folder, model, lambda m: square(m(x)))


def outlier(folder: Path, model: nn.Module) -> Path:
    x = torch.randn(8, 6)
    square(model(x)).backward()
    usual = norm_of(model)
    model.zero_grad()
    x[5] *= 1e4
    return incident(folder, model, lambda m: square(m(x)), usual)


def linear() -> nn.Linear:
    return nn.Linear(6, 2)


class Weighted(nn.Module):
    """Weighs the loss of a batch with a number that comes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, x: Tensor, target: Tensor, weight: float = 1.0) -> Tensor:
        return F.mse_loss(self.body(x), target) * weight


def weighted() -> nn.Module:
    return Weighted()


def _usual(model: nn.Module, x: Tensor, target: Tensor) -> float:
    model(x, target).backward()
    norm = norm_of(model)
    model.zero_grad()
    return norm


def wrong_unit(folder: Path, model: nn.Module) -> Path:
    x, target = torch.randn(8, 6), torch.randn(8, 2)
    return incident(folder, model, lambda m: m(x, target, weight=1000.0), _usual(model, x, target))


def nan_number(folder: Path, model: nn.Module) -> Path:
    x, target = torch.randn(8, 6), torch.randn(8, 2)
    return incident(folder, model, lambda m: m(x, target, weight=math.nan))


def weights_too_far(folder: Path, model: nn.Module) -> Path:
    x, target = torch.randn(8, 6), torch.randn(8, 2)
    usual = _usual(model, x, target)
    optimizer = torch.optim.SGD(model.parameters(), lr=30.0)
    model(x, target).backward()
    optimizer.step()
    model.zero_grad()
    return incident(folder, model, lambda m: m(x, target), usual)


class Decoder(nn.Module):
    """A mask of one number per image, blown up by 32: its gradient is the sum over 1024 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 4)
        self.scale = 1

    def forward(self, x: Tensor) -> Tensor:
        small = self.encoder(x).view(-1, 1, 2, 2)
        return F.interpolate(small, scale_factor=self.scale, mode="nearest")


def total_error(output: Tensor, *_args: Any) -> Tensor:
    return (output - 1).square().sum()


def upsampling(folder: Path, model: Any) -> Path:
    x, model.scale = torch.randn(4, 8), 1
    total_error(model(x)).backward()
    usual = norm_of(model)
    model.zero_grad()
    model.scale = 32
    return incident(folder, model, lambda m: total_error(m(x)), usual)


def decoder() -> nn.Module:
    model = Decoder()
    model.scale = 32
    return model


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).relu()


class Residual(nn.Module):
    """Blocks whose branch is as large as what it is added to, without a norm layer."""

    def __init__(self, spread: float = 0.45) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(14))
        self.head = nn.Linear(16, 1)
        for block in self.blocks:
            nn.init.normal_(block.inner.weight, std=spread)  # type: ignore[union-attr, arg-type]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def exploding_residual(folder: Path, model: nn.Module) -> Path:
    x = torch.randn(8, 16)
    calm = Residual(0.05)
    mean_of(calm(x)).backward()
    return incident(folder, model, lambda m: mean_of(m(x)), norm_of(calm))


def mean_of(output: Tensor, *_args: Any) -> Tensor:
    return output.mean()


class Inverse(torch.autograd.Function):
    """1 / x in its forward's own way, 0 for 0; its backward forgets the 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x == 0, torch.zeros_like(x), 1 / torch.where(x == 0, torch.ones_like(x), x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return -grad / x.square()


class OwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return Inverse.apply(self.stem(x) * keep).mean()


def own_backward(folder: Path, model: nn.Module) -> Path:
    x, keep = torch.randn(8, 4), torch.ones(8, 4)
    keep[0, 1] = 0.0
    assert model(x, keep).isfinite()
    return incident(folder, model, lambda m: m(x, keep))


def broken_weights(folder: Path, model: nn.Module) -> Path:
    with torch.no_grad():
        next(iter(model.parameters()))[0, 0] = math.nan
    x = torch.randn(8, 6)
    return incident(folder, model, lambda m: square(m(x)))


BROKEN: tuple[Broken, ...] = tuple(
    Broken(name, wrong, "replay", ("\nreproduced:", *names), explained(make, call, loss))
    for name, wrong, names, make, call, loss in (
        (
            "log_zero",
            "log of a probability that is rounded to 0",
            ("first: log gave -Inf", "probabilities.log()"),
            LogOfSoftmax,
            log_of_zero,
            None,
        ),
        (
            "mask_0_by_0",
            "mean over a row that is masked as a whole, 0/0",
            ("first: div gave NaN", "module pool"),
            MaskedMean,
            empty_mask,
            None,
        ),
        (
            "masked_softmax",
            "softmax over a row of -inf",
            ("first: softmax made NaN out of -Inf", "scores.softmax(-1)"),
            Attention,
            all_masked,
            square,
        ),
        (
            "fp16_exp",
            "exp overflows in fp16",
            ("first: exp gave Inf", "torch.exp(self.scores(x))", "it became NaN in div"),
            HalfSoftmax,
            fp16_overflow,
            square,
        ),
        (
            "sqrt_backward",
            "sqrt at 0, finite until the backward",
            ("first: sqrt backward gave Inf", ".sqrt().mean()", "the alarm named encoder.weight"),
            Distance,
            sqrt_at_zero,
            None,
        ),
        (
            "where_log",
            "torch.where over log(0), finite until the backward",
            ("first: log backward gave NaN", "open_.log()"),
            WhereLog,
            where_log,
            None,
        ),
        (
            "own_backward",
            "a division by 0 in the backward of an own autograd function",
            ("first: Inverse backward gave", "grad / x.square()"),
            OwnFunction,
            own_backward,
            None,
        ),
        (
            "nan_sample",
            "one sample of the batch holds NaN",
            ("first: sample 3 of input 0 holds NaN",),
            mlp,
            nan_sample,
            square,
        ),
        (
            "nan_weight",
            "a weight is NaN already",
            ("first: parameter 0.weight holds NaN",),
            mlp,
            broken_weights,
            square,
        ),
        (
            "outlier_sample",
            "one sample is 10,000 times too large",
            ("first: sample 5 of input 0 reaches",),
            linear,
            outlier,
            square,
        ),
        (
            "wrong_unit",
            "a weight of 1,000 on a batch's loss",
            ("first: the loss is multiplied by 1e+03 before anything else",),
            weighted,
            wrong_unit,
            None,
        ),
        (
            "nan_number",
            "a weight on the loss that is NaN",
            ("first: mul was given a number that is NaN",),
            weighted,
            nan_number,
            None,
        ),
        (
            "weights_too_far",
            "weights that one step at 30 times the learning rate has thrown",
            ("first: no operation stands out", "lower it, or warm it up"),
            weighted,
            weights_too_far,
            None,
        ),
        (
            "upsampling_gradient",
            "a gradient is summed over the copies of an upsampling",
            ("first: upsample_nearest2d backward is the first that jumps", "F.interpolate(small"),
            decoder,
            upsampling,
            total_error,
        ),
        (
            "residual_growth",
            "a residual stream without norm layers grows in each block",
            ("first: no single operation jumps", "blocks."),
            Residual,
            exploding_residual,
            mean_of,
        ),
    )
)
