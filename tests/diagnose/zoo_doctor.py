"""Trainings that are broken before they start: `diagnose` must name the layer, operation or cause of each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from healthy import classify, next_token, pictures, text_batch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import Broken

from gradmon.diagnose.doctor import diagnose

Asked = tuple[nn.Module, Any, Any] | tuple[nn.Module, Any, Any, torch.optim.Optimizer]


def audited(make: Callable[[], Asked]) -> Callable[[Path], str]:
    """What the doctor says of it, but for infos: those are said of healthy models too."""

    @functools.wraps(make)
    def find(_: Path) -> str:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, batch, loss_fn, *optimizer = make()
            diagnosis = diagnose(model, batch, loss_fn, optimizer=optimizer[0] if optimizer else None)
        assert diagnosis  # in a condition: something is wrong
        return "\n".join(str(finding) for finding in diagnosis if finding.severity != "info")

    return find


def rows(samples: int = 128, width: int = 32, classes: int = 10) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, width), torch.arange(samples) % classes


def perceptron(*widths: int, between: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [nn.Linear(inner, outer), between()]
    return nn.Sequential(*layers[:-1])


def bad_init() -> Asked:
    """One hidden layer at ten times He's standard deviation."""
    model = perceptron(32, 64, 64, 10)
    nn.init.normal_(model[2].weight, std=10 * math.sqrt(2 / 64))
    return model, rows(), classify


def tiny_init() -> Asked:
    model = perceptron(32, 64, 64, 10)
    nn.init.normal_(model[2].weight, std=0.1 * math.sqrt(2 / 64))
    return model, rows(), classify


def high_rate() -> Asked:
    model = perceptron(32, 64, 64, 10)
    return model, rows(), classify, torch.optim.SGD(model.parameters(), lr=300.0)


def low_rate() -> Asked:
    model = perceptron(32, 64, 64, 10)
    return model, rows(), classify, torch.optim.AdamW(model.parameters(), lr=1e-9)


class Decoder(nn.Module):
    """Three transposed convolutions whose weights are as an embedding's, of variance 1."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(3, 8, 8, stride=8)
        self.ups = nn.ModuleList([nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1) for _ in range(3)])
        self.head = nn.Conv2d(8, 3, 1)
        for up in self.ups:
            nn.init.normal_(up.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        for up in self.ups:
            x = F.relu(up(x))
        return self.head(x)


def upsampling_growth() -> Asked:
    return Decoder(), pictures(8, 16)[0], lambda model, x: F.mse_loss(model(x), x)


class Sharpener(nn.Module):
    """Bicubic upsampling and a gain, five times over: no layer is badly initialised, the chain still grows."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = F.interpolate(self.conv(x), scale_factor=2, mode="bicubic") * 2.5
        return x.mean(dim=(2, 3))

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        nn.init.dirac_(self.conv.weight)
        with torch.no_grad():
            self.conv.weight.add_(0.02 * torch.randn(3, 3, 3, 3))


def interpolation_growth() -> Asked:
    images, labels = pictures(12, 8, classes=3)
    return Sharpener(), (images, labels), classify


class Dense(nn.Module):
    """Concatenates what it makes to what it has, and each part is four times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16 * (i + 1), 16) for i in range(4)])
        self.head = nn.Linear(80, 10)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=4 / math.sqrt(layer.in_features))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return self.head(x) / 1000


def concat_growth() -> Asked:
    return Dense(), rows(width=16), classify


class TwoSources(nn.Module):
    """A picture's features beside a raw price in cents."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(16, 16)
        self.head = nn.Linear(17, 10)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        features, price = inputs
        return self.head(torch.cat([self.features(features), price], dim=1))


def concat_mismatch() -> Asked:
    features, labels = rows(width=16)
    return TwoSources(), ((features, 2000 * torch.rand(128, 1)), labels), classify


def dead_relu() -> Asked:
    """Biases far below 0, as a step that was too large leaves them."""
    model = perceptron(32, 64, 64, 10)
    nn.init.constant_(model[2].bias, -5.0)
    return model, rows(), classify


def large_preactivation() -> Asked:
    inputs, labels = rows()
    model = perceptron(32, 64, 10)
    nn.init.constant_(model[0].bias, 20.0)
    return model, (inputs, labels), classify


def saturated_sigmoid() -> Asked:
    """Inputs in 0..255, as a picture's bytes, not brought to 0..1."""
    inputs, labels = rows()
    return perceptron(32, 64, 64, 10, between=nn.Sigmoid), (inputs * 64 + 128, labels), classify


class TiedModel(nn.Module):
    """Embedding and head share a weight that starts as embeddings do, with variance 1."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, 64)
        self.hidden = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.LayerNorm(64))
        self.head = nn.Linear(64, tokens, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(tokens)))


def tied_head() -> Asked:
    tokens, targets, alphabet = text_batch(8, 48)
    return TiedModel(alphabet), (tokens, targets), next_token


class Unrolled(nn.Module):
    """One layer applied 24 times that stretches what it gets by 1.3: its gradient is a sum of growing parts."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(32, 32)
        self.cell = nn.Linear(32, 32, bias=False)
        self.head = nn.Linear(32, 10)
        nn.init.orthogonal_(self.cell.weight, gain=1.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for _ in range(24):
            x = self.cell(x)
        return self.head(x)


def reused_layer() -> Asked:
    return Unrolled(), rows(), classify


def deep_chain() -> Asked:
    """Sixteen layers, each well initialised, nothing to hold on to between them."""
    model = perceptron(32, *[64] * 16, 10)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return model, rows(), classify


def deep_sigmoid() -> Asked:
    return perceptron(32, *[32] * 9, 10, between=nn.Sigmoid), rows(), classify


class Stream(nn.Module):
    """Ten residual blocks without normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(64, 64)
        self.blocks = nn.ModuleList([perceptron(64, 64, 64) for _ in range(10)])
        self.head = nn.Linear(64, 10)
        for block in self.blocks:
            nn.init.kaiming_normal_(block[0].weight, nonlinearity="relu")
            nn.init.xavier_normal_(block[2].weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x) / 30


def residual_growth() -> Asked:
    return Stream(), rows(width=64), classify


def labels_from_one() -> Asked:
    """Classes counted from 1: the last is out of range."""
    inputs, labels = rows()
    return perceptron(32, 64, 10), (inputs, labels + 1), classify


def one_class() -> Asked:
    inputs, labels = rows()
    return perceptron(32, 64, 10), (inputs, torch.zeros_like(labels)), classify


def imbalance() -> Asked:
    inputs, _ = rows(256, classes=2)
    return perceptron(32, 64, 2), (inputs, (torch.arange(256) < 8).long()), classify


def half_unscaled() -> Asked:
    """Mixed precision in fp16, and a loss whose gradients lie below its range."""
    model = perceptron(32, 64, 64, 10)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            output = model(batch[0])
        return 1e-4 * F.cross_entropy(output.float(), batch[1])

    return model, rows(), loss


def small_epsilon() -> Asked:
    model = perceptron(32, 64, 64, 10).half()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-8)
    inputs, labels = rows()
    return model, (inputs.half(), labels), lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]), optimizer


class PreActivation(nn.Module):
    """A residual block whose first ReLU overwrites what the shortcut needs."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.act(x))


def overwritten() -> Asked:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), PreActivation(), *head)
    return model, pictures(20, 16), classify


class LogOfSoftmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(torch.softmax(self.head(x), dim=1))


def log_of_zero() -> Asked:
    inputs, labels = rows()
    return LogOfSoftmax(), (inputs * 300, labels), lambda model, batch: F.nll_loss(model(batch[0]), batch[1])


def large_head() -> Asked:
    model = perceptron(32, 64, 10)
    nn.init.normal_(model[2].weight, std=3.0)
    return model, rows(), classify


def _case(name: str, wrong: str, make: Callable[[], Asked], *names: str) -> Broken:
    return Broken(name, wrong, "doctor", names, audited(make))


BROKEN: tuple[Broken, ...] = (
    _case("bad init", "a layer's weights 10 times too large", bad_init, "bad_init", "2.weight", "kaiming_normal_"),
    _case("faint init", "a layer's weights 10 times too small", tiny_init, "bad_init", "2.weight", "fade"),
    _case("LR too high", "SGD with a rate of 300", high_rate, "learning_rate_high", "loss on the same batch"),
    _case("LR too low", "AdamW with a rate of 1e-9", low_rate, "learning_rate_low"),
    _case(
        "upsampling growth",
        "transposed convolutions that grow from one to the next",
        upsampling_growth,
        "upsampling_growth",
        "ups.0",
        "transpose",
    ),
    _case(
        "interpolation growth",
        "a chain of bicubic upsamplings, each with a gain",
        interpolation_growth,
        "interpolate",
        "upsampling",
    ),
    _case(
        "concat growth",
        "a concatenation whose parts are each 4 times as large",
        concat_growth,
        "concat_growth",
        "cat",
        "zoo_doctor.py",
    ),
    _case(
        "concat of unlike sizes",
        "a raw price concatenated with features",
        concat_mismatch,
        "concat_growth",
        "unlike size",
    ),
    _case("dead ReLU", "a ReLU whose biases are far below 0", dead_relu, "dead_relu", "'3'", "LeakyReLU"),
    _case(
        "large pre-activations", "biases of 20 before a ReLU", large_preactivation, "large_preactivation", "'1'", "SELU"
    ),
    _case(
        "saturated sigmoid",
        "sigmoid units fed with 0 to 255",
        saturated_sigmoid,
        "saturated_activation",
        "'1'",
        "sigmoid",
    ),
    _case("tied weights", "a head tied to embeddings of variance 1", tied_head, "shared_weight", "embed.weight = head"),
    _case(
        "one layer used 24 times",
        "one layer used 24 times, whose gradients add up",
        reused_layer,
        "shared_weight",
        "cell.weight",
        "24 times",
    ),
    _case("deep plain chain", "17 layers, no norm, no residual", deep_chain, "deep_plain_chain", "17 layers"),
    _case("vanishing", "10 layers of sigmoids", deep_sigmoid, "vanishing_gradient", "0.weight"),
    _case(
        "residual growth", "10 residual blocks without a norm", residual_growth, "residual_growth", "10 residual sums"
    ),
    _case("bad labels", "classes counted from 1", labels_from_one, "bad_labels", "outside 0 to 9", "go from 1 to 10"),
    _case("one class", "all labels alike", one_class, "constant_labels", "all 128 labels"),
    _case("class imbalance", "classes 31 to 1", imbalance, "class_imbalance", "248"),
    _case(
        "fp16 without scaler",
        "fp16 without a scaler: gradients below its range",
        half_unscaled,
        "fp16_without_scaler",
        "GradScaler",
    ),
    _case("epsilon in fp16", "Adam's eps of 1e-8 in fp16, where it is 0", small_epsilon, "epsilon_small", "eps=1e-08"),
    _case(
        "in-place ReLU",
        "an in-place ReLU that overwrites the shortcut",
        overwritten,
        "inplace_reuse",
        "2.act",
        "inplace=False",
    ),
    _case("log(0)", "log of a softmax", log_of_zero, "nonfinite_forward", "log"),
    _case("large logits", "a head 12 times too large", large_head, "loss_at_start", "ln(10)"),
)
