"""GPT-2 and Llama as one writes them in plain PyTorch, to be compiled whole: what Halfstep is compared with.

Written after Radford et al. 2019 (GPT-2), Touvron et al. 2023 (Llama), Su et al. 2021 (rotary positions), Shazeer 2020
(SwiGLU) and Ainslie et al. 2023 (grouped queries). The modules stand in the order of transformers' parameters, which is
how a test gives both the same weights. No dropout: the presets have none.
"""

import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import Tensor, nn

from halfstep.models.shapes import Shape


def plain(shape: Shape) -> nn.Module:
    """Return the model of a shape with fp32 weights; it maps (tokens, targets) to the mean cross-entropy in nats."""
    return GPT2(shape) if shape.family == "gpt2" else Llama(shape)


def _normal(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)


class _Heads(nn.Module):
    """What both attentions share: causal attention by torch's fused kernels."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = shape.heads, shape.kv_heads, shape.head_dim

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.dim)).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = self.heads != self.kv_heads
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return mixed.transpose(1, 2).flatten(-2)


class _GPT2Block(_Heads):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        width = shape.width
        self.norm_1 = nn.LayerNorm(width, eps=shape.norm_eps)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width, eps=shape.norm_eps)
        self.up, self.down = nn.Linear(width, shape.ffn), nn.Linear(shape.ffn, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.split(part, self.heads) for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1))
        x = x + self.out(self.attend(query, key, value))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """Learned positions, LayerNorm before each half of a block, a head tied to the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.positions, shape.width)
        self.blocks = nn.ModuleList(_GPT2Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        _normal(self)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of (batch, sequence) tokens against the tokens that follow them."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class _LlamaBlock(_Heads):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        width, kv = shape.width, shape.kv_heads * shape.head_dim
        query = shape.heads * shape.head_dim
        self.query, self.key, self.value = (nn.Linear(width, out, bias=False) for out in (query, kv, kv))
        self.out = nn.Linear(query, width, bias=False)
        self.gate, self.up = (nn.Linear(width, shape.ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.ffn, width, bias=False)
        self.norm_1, self.norm_2 = (nn.RMSNorm(width, eps=shape.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        seen = self.norm_1(x)
        query = _rotated(self.split(self.query(seen), self.heads), cos, sin)
        key = _rotated(self.split(self.key(seen), self.kv_heads), cos, sin)
        x = x + self.out(self.attend(query, key, self.split(self.value(seen), self.kv_heads)))
        seen = self.norm_2(x)
        return x + self.down(F.silu(self.gate(seen)) * self.up(seen))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Llama(nn.Module):
    """Rotary positions (plain ones: Llama 3.2's scaling changes frequencies, not work), RMSNorm, SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(_LlamaBlock(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.head = None if shape.tied else nn.Linear(shape.width, shape.vocabulary, bias=False)
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        self.register_buffer("frequencies", (shape.rope_theta or 10000.0) ** -half, persistent=False)
        _normal(self)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of (batch, sequence) tokens against the tokens that follow them."""
        angles = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * self.frequencies
        angles, x = torch.cat((angles, angles), dim=-1), self.tokens(tokens)
        wide = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        cos, sin = angles.cos().to(wide), angles.sin().to(wide)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = F.linear(self.norm(x), self.tokens.weight if self.head is None else self.head.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
