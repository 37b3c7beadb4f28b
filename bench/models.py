"""Models of the kinds people train, small by default for the tests, in real sizes for the
benchmarks.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(
    sizes: tuple[int, ...] = (12, 16, 16, 4),
    activation: type[nn.Module] = nn.ReLU,
    norm: bool = True,
) -> nn.Module:
    """Linear layers of the given sizes, an activation between them, a LayerNorm after the first."""
    layers = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), activation()]
    if norm:
        layers.insert(2, nn.LayerNorm(sizes[1]))
    return nn.Sequential(*layers[:-1])


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(n, t, d))


class Block(nn.Module):
    """Pre-norm transformer block, its MLP scaled by a parameter unless told not to."""

    def __init__(
        self, width: int, heads: int, causal: bool, expansion: int = 2, scaled: bool = True
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.mlp = nn.Sequential(
            nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width)
        )
        self.scale = nn.Parameter(torch.full((width,), 0.5)) if scaled else 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.mlp(self.norm2(x))
        return x + (self.scale * y if isinstance(self.scale, Tensor) else y)


class LanguageModel(nn.Module):
    """Pre-norm transformer; positions looked up by torch.arange, head tied to the embedding unless
    told not to.
    """

    def __init__(
        self,
        vocabulary: int = 29,
        width: int = 16,
        heads: int = 2,
        layers: int = 2,
        context: int = 12,
        expansion: int = 2,
        tied: bool = True,
        scaled: bool = True,
    ):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, True, expansion, scaled) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def transformer(
    vocabulary: int, width: int, heads: int, layers: int, expansion: int = 4
) -> nn.Module:
    """Embedding, causal pre-norm blocks, untied head: no positions, no final norm. (E, T) ids ->
    (E, T, vocabulary).
    """
    blocks = (
        Block(width, heads, causal=True, expansion=expansion, scaled=False) for _ in range(layers)
    )
    return nn.Sequential(nn.Embedding(vocabulary, width), *blocks, nn.Linear(width, vocabulary))


def rotated(x: Tensor) -> Tensor:
    """Rotary positions: (..., T, d), the pair (i, i + d/2) at position t turned by t /
    10000^(2i/d).
    """
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * frequency
    a, b = x[..., :half], x[..., half:]
    return torch.cat(
        [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1
    ).to(x.dtype)


class LlamaBlock(nn.Module):
    """RMSNorm, rotary attention, SwiGLU, no biases: (E, T, width) -> the same."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (
            nn.Linear(width, hidden, bias=False),
            nn.Linear(width, hidden, bias=False),
        )
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        y = self.norm1(x)
        q, k, v = (
            linear(y).reshape(n, t, self.heads, width // self.heads).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(n, t, width))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, a LayerNorm, an MLP over channels, all scaled by a parameter per channel."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.mlp(y)).permute(0, 3, 1, 2)


class ConvNeXtStage(nn.Module):
    """Blocks of one width between a 2x2 stride-2 convolution and a pooled head."""

    def __init__(self, before: int = 4, width: int = 8, blocks: int = 2, classes: int = 5):
        super().__init__()
        self.downsample = nn.Conv2d(before, width, 2, stride=2)
        self.blocks = nn.Sequential(*(ConvNeXtBlock(width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.downsample(x)).mean(dim=(2, 3))))


class VisionTransformer(nn.Module):
    """Patches by a strided convolution, a class token, more learned positions than needed."""

    def __init__(
        self, size: int = 8, patch: int = 4, width: int = 16, heads: int = 2, layers: int = 2
    ):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 3, width) * 0.1)
        self.blocks = nn.ModuleList(Block(width, heads, causal=False) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.positions[:, : x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int, norm_groups: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(norm_groups, after), nn.GroupNorm(norm_groups, after)
        self.shortcut = nn.Identity()
        if stride != 1 or before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.GroupNorm(norm_groups, after))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, four times as wide at the end as in the middle."""

    def __init__(self, before: int, middle: int, stride: int, norm_groups: int):
        super().__init__()
        after = 4 * middle
        self.conv1 = nn.Conv2d(before, middle, 1, bias=False)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, padding=1, bias=False)
        self.conv3 = nn.Conv2d(middle, after, 1, bias=False)
        self.norm1, self.norm2 = (
            nn.GroupNorm(norm_groups, middle),
            nn.GroupNorm(norm_groups, middle),
        )
        self.norm3, self.shortcut = nn.GroupNorm(norm_groups, after), nn.Identity()
        if stride != 1 or before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.GroupNorm(norm_groups, after))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x), inplace=True)


class ResNet18(nn.Module):
    """Stem, basic blocks (2, 2, 2, 2), every norm a GroupNorm; `width` 64 is the original."""

    depths = (2, 2, 2, 2)
    block, expansion = Residual, 1

    def __init__(self, width: int = 8, classes: int = 5, norm_groups: int = 4):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.norm = nn.GroupNorm(norm_groups, width)
        stages, channels = [], width
        for stage, depth in enumerate(self.depths):
            for nth in range(depth):
                stages.append(
                    self.block(channels, width << stage, 2 if stage and not nth else 1, norm_groups)
                )
                channels = self.expansion * width << stage
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(images)), inplace=True), 3, 2, padding=1)
        return self.head(self.stages(x).mean(dim=(2, 3)))


class ResNet50(ResNet18):
    """Bottleneck blocks (3, 4, 6, 3) instead."""

    depths = (3, 4, 6, 3)
    block, expansion = Bottleneck, 4


def whole_models() -> dict:
    """name -> () -> (model, batch), freshly seeded."""

    def make(model, batch):
        def build():
            torch.manual_seed(0)
            return model(), batch()

        return build

    return {
        "mlp": make(mlp, lambda: torch.randn(7, 12)),
        "language model": make(LanguageModel, lambda: torch.randint(0, 29, (5, 9))),
        "resnet18": make(ResNet18, lambda: torch.randn(4, 3, 32, 32)),
        "vit": make(VisionTransformer, lambda: torch.randn(5, 3, 8, 8)),
        "transformer": make(
            lambda: transformer(29, 16, 2, 2), lambda: torch.randint(0, 29, (5, 9))
        ),
        "llama block": make(lambda: LlamaBlock(16, 2, 24), lambda: torch.randn(5, 9, 16)),
        "convnext stage": make(ConvNeXtStage, lambda: torch.randn(5, 4, 8, 8)),
    }
