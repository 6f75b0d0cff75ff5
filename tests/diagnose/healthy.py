"""Ten models as people train them, with proper weights and data that has something to learn: no tool may complain.

Small enough for a CPU: a forward and a backward take well under 0.3 s each. All are seeded, and the caller's random
state is left as it was.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pydoc_data.topics import topics  # text that ships with Python
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import Healthy

Made = tuple[nn.Module, Any, Callable[[nn.Module, Any], Tensor]]


def seeded(make: Callable[[], Made]) -> Callable[[], Made]:
    """The same model and batch each time, whatever was drawn before."""

    @functools.wraps(make)
    def made() -> Made:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make()

    return made


def pictures(samples: int, size: int, classes: int = 10, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Stripes whose angle is their class, under noise: [samples, channels, size, size], mean 0 and variance 1."""
    labels = torch.arange(samples) % classes
    angle = labels[:, None, None] * (math.pi / classes)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    phase = torch.rand(samples, 1, 1) * 2 * math.pi
    stripes = torch.sin(0.9 * (rows * torch.sin(angle) + columns * torch.cos(angle)) + phase)
    images = stripes[:, None].expand(-1, channels, -1, -1) + 0.5 * torch.randn(samples, channels, size, size)
    return (images - images.mean()) / images.std(), labels


def text_batch(samples: int, length: int) -> tuple[Tensor, Tensor, int]:
    """Characters of Python's own manual, the character after each, and how many there are: [samples, length] twice."""
    text = topics["assignment"]
    alphabet = {c: i for i, c in enumerate(sorted(set(text)))}
    codes = torch.tensor([alphabet[c] for c in text[: samples * length + 1]])
    return codes[:-1].view(samples, length), codes[1:].view(samples, length), len(alphabet)


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def next_token(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, targets = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


@seeded
def mlp() -> Made:
    """Rows of a table with ten clusters; weights as PyTorch makes them."""
    centres = torch.randn(10, 32)
    labels = torch.arange(128) % 10
    rows = (centres[labels] + 0.7 * torch.randn(128, 32)) / 1.22
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return model, (rows, labels), classify


@seeded
def cnn() -> Made:
    """Convolution, BatchNorm, ReLU in place, pooling: weights as PyTorch makes them."""

    def block(inner: int, outer: int) -> list[nn.Module]:
        return [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(inplace=True), nn.MaxPool2d(2)]

    model = nn.Sequential(
        *block(3, 16), *block(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(32, 10)
    )
    return model, pictures(60, 16), classify


class BasicBlock(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride=stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


@seeded
def resnet() -> Made:
    """He initialisation, as torchvision's."""
    stages = [BasicBlock(16, 16, 1), BasicBlock(16, 16, 1), BasicBlock(16, 32, 2), BasicBlock(32, 32, 1)]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    model = nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model, pictures(30, 16), classify


class UNet(nn.Module):
    """Two levels, one way up by interpolation and one by a transposed convolution, skips joined by concatenation."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1 = self.twice(3, width)
        self.down2 = self.twice(width, 2 * width)
        self.bottom = self.twice(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.merge2 = self.twice(4 * width, 2 * width)
        self.merge1 = self.twice(3 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    @staticmethod
    def twice(inner: int, outer: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width in (inner, outer):
            layers += [nn.Conv2d(width, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.bottom(F.max_pool2d(two, 2))
        x = self.merge2(torch.cat([self.up2(x), two], dim=1))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(self.merge1(torch.cat([x, one], dim=1)))


@seeded
def unet() -> Made:
    """Finds a bright disc in noise."""
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    centres = torch.randint(8, 24, (6, 2, 1, 1))
    masks = (((rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2) < 36).float()[:, None]
    images = 2 * masks + 0.7 * torch.randn(6, 3, 32, 32)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    return UNet(), ((images - images.mean()) / images.std(), masks), loss


class PreNormBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        samples, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(samples, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(samples, length, width))
        return x + self.mlp(self.norm2(x))


class CharacterModel(nn.Module):
    """GPT-2 in small: its initialisation, its scaled residual projections, embedding and head tied."""

    def __init__(self, tokens: int, length: int, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.place = nn.Parameter(torch.zeros(1, length, width))
        self.blocks = nn.ModuleList([PreNormBlock(width, 4) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.place, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                last = name.endswith(("out", "mlp.2"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * depth) if last else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@seeded
def transformer() -> Made:
    """Characters of real text."""
    tokens, targets, alphabet = text_batch(8, 48)
    return CharacterModel(alphabet, 48), (tokens, targets), next_token


class Reader(nn.Module):
    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, 32)
        self.lstm = nn.LSTM(32, 64, num_layers=2, batch_first=True)
        self.head = nn.Linear(64, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


@seeded
def lstm() -> Made:
    """The same text by an LSTM; weights as PyTorch makes them."""
    tokens, targets, alphabet = text_batch(8, 32)
    return Reader(alphabet), (tokens, targets), next_token


class VisionTransformer(nn.Module):
    """PyTorch's own encoder layers, pre-norm, over patches and a class token."""

    def __init__(self, width: int = 64, depth: int = 3, patches: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(torch.empty(1, patches + 1, width))
        nn.init.trunc_normal_(self.place, std=0.02)
        layer = functools.partial(nn.TransformerEncoderLayer, width, 4, 2 * width, 0.1, F.gelu, norm_first=True)
        self.blocks = nn.Sequential(*[layer(batch_first=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.place
        return self.head(self.norm(self.blocks(x))[:, 0])


@seeded
def vit() -> Made:
    return VisionTransformer(), pictures(40, 16), classify


class Gan(nn.Module):
    """Generator and discriminator of a small DCGAN; the loss trains both at once, each by its own gradients only."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            *[nn.ConvTranspose2d(32, 2 * width, 4), nn.BatchNorm2d(2 * width), nn.ReLU()],
            *[nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()],
            *[nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1), nn.Tanh()],
        )
        self.discriminator = nn.Sequential(
            *[nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)],
            *[nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2)],
            *[nn.Conv2d(2 * width, 1, 4), nn.Flatten()],
        )

    def judged(self, images: Tensor, *, frozen: bool = False) -> Tensor:
        """Of the discriminator; frozen, it passes gradients on but gets none."""
        for parameter in self.discriminator.parameters():
            parameter.requires_grad_(not frozen)
        verdict = self.discriminator(images)
        for parameter in self.discriminator.parameters():
            parameter.requires_grad_(True)
        return verdict


@seeded
def gan() -> Made:
    real = pictures(24, 16)[0].clamp(-2, 2) / 2
    noise = torch.randn(24, 32, 1, 1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert isinstance(model, Gan)
        real, noise = batch
        fake = model.generator(noise)
        on_real, on_fake = model.judged(real), model.judged(fake.detach())
        fooled = model.judged(fake, frozen=True)
        bce = F.binary_cross_entropy_with_logits
        discriminator = bce(on_real, torch.ones_like(on_real)) + bce(on_fake, torch.zeros_like(on_fake))
        return discriminator + bce(fooled, torch.ones_like(fooled))

    return Gan(), (real, noise), loss


@seeded
def autoencoder() -> Made:
    """Linear layers and tanh, Xavier initialisation, onto a picture in 0..1."""
    model = nn.Sequential(
        *[nn.Flatten(), nn.Linear(256, 96), nn.Tanh(), nn.Linear(96, 16)],
        *[nn.Linear(16, 96), nn.Tanh(), nn.Linear(96, 256), nn.Sigmoid()],
    )
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, gain=nn.init.calculate_gain("tanh"))
            nn.init.zeros_(module.bias)
    images = (pictures(64, 16, channels=1)[0] / 6 + 0.5).clamp(0, 1)

    def loss(model: nn.Module, images: Tensor) -> Tensor:
        return F.mse_loss(model(images), images.flatten(1))

    return model, images, loss


class BagClassifier(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(words, 32, mode="mean")
        self.hidden = nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.bag(words))))


@seeded
def embedding_bag() -> Made:
    """Which page of the manual a line is from, by its words."""
    pages = [topics[name].split() for name in ("assignment", "for", "class", "function")]
    vocabulary = {word: i for i, word in enumerate(sorted({word for page in pages for word in page}))}
    lines = [page[i * 8 : i * 8 + 8] for i in range(16) for page in pages]
    words = torch.tensor([[vocabulary[word] for word in line] for line in lines])
    return BagClassifier(len(vocabulary)), (words, torch.arange(64) % 4), classify


HEALTHY: tuple[Healthy, ...] = (
    Healthy("MLP", mlp),
    Healthy("CNN with BatchNorm", cnn),
    Healthy("ResNet", resnet),
    Healthy("U-Net", unet),
    Healthy("pre-norm transformer", transformer),
    Healthy("LSTM", lstm),
    Healthy("ViT", vit),
    Healthy("GAN", gan),
    Healthy("autoencoder", autoencoder),
    Healthy("embedding bag", embedding_bag),
)
