"""The published models, written a second time straight from their state dicts: the oracle for ours.

Nothing here is shared with fastvit_train. Everything is computed in the state dict's dtype.
"""

import math

import torch
from torch import Tensor

StateDict = dict[str, Tensor]


def linear(state: StateDict, name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def layer_norm(state: StateDict, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def softmax(x: Tensor, dim: int) -> Tensor:
    exponentials = (x - x.amax(dim, keepdim=True)).exp()
    return exponentials / exponentials.sum(dim, keepdim=True)


def heads_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), -1) @ v


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_exact(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def patches(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Cut patches row by row and project each."""
    side = weight.shape[-1]
    cut = images.unfold(2, side, side).unfold(3, side, side)  # (batch, channels, rows, columns, side, side)
    flat = cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return flat @ weight.flatten(1).T + bias


def seed_logits(state: StateDict, images: Tensor, depth: int, num_heads: int) -> Tensor:
    """The seed's upstream c-ViT, per-head or merged, by its own names."""
    x = patches(
        images,
        state["embedding.patch_embeddings.projection.weight"],
        state["embedding.patch_embeddings.projection.bias"],
    )
    x = torch.cat((state["embedding.cls_token"].expand(len(x), -1, -1), x), 1) + state["embedding.position_embeddings"]
    for i in range(depth):
        block = f"encoder.blocks.{i}"
        normed = layer_norm(state, f"{block}.layernorm_1", x)
        outputs = []
        for head in range(num_heads):
            if f"{block}.attention.heads.{head}.query.weight" in state:
                q, k, v = (
                    linear(state, f"{block}.attention.heads.{head}.{n}", normed) for n in ("query", "key", "value")
                )
            else:
                merged = linear(state, f"{block}.attention.qkv_projection", normed).chunk(3, -1)
                q, k, v = (part.chunk(num_heads, -1)[head] for part in merged)
            outputs.append(heads_attention(q, k, v))
        x = x + linear(state, f"{block}.attention.output_projection", torch.cat(outputs, -1))
        hidden = gelu_tanh(linear(state, f"{block}.mlp.dense_1", layer_norm(state, f"{block}.layernorm_2", x)))
        x = x + linear(state, f"{block}.mlp.dense_2", hidden)
    return linear(state, "classifier", x[:, 0])


def compact_logits(state: StateDict, images: Tensor, depth: int, num_heads: int) -> Tensor:
    """The published compact family (ViT-Lite, CVT, CCT), by its own names."""
    x = images
    if "tokenizer.conv_layers.0.0.bias" in state:
        x = patches(x, state["tokenizer.conv_layers.0.0.weight"], state["tokenizer.conv_layers.0.0.bias"])
    else:
        layer = 0
        while f"tokenizer.conv_layers.{layer}.0.weight" in state:
            weight = state[f"tokenizer.conv_layers.{layer}.0.weight"]
            x = torch.conv2d(x, weight, stride=1, padding=1).clamp(min=0)
            x = torch.max_pool2d(x, 3, 2, 1)
            layer += 1
        x = x.flatten(2).transpose(1, 2)
    if "classifier.class_emb" in state:
        x = torch.cat((state["classifier.class_emb"].expand(len(x), -1, -1), x), 1)
    x = x + state["classifier.positional_emb"]
    for i in range(depth):
        block = f"classifier.blocks.{i}"
        merged = linear(state, f"{block}.self_attn.qkv", layer_norm(state, f"{block}.pre_norm", x)).chunk(3, -1)
        heads = zip(*(part.chunk(num_heads, -1) for part in merged), strict=True)
        joined = torch.cat([heads_attention(q, k, v) for q, k, v in heads], -1)
        x = layer_norm(state, f"{block}.norm1", x + linear(state, f"{block}.self_attn.proj", joined))
        x = x + linear(state, f"{block}.linear2", gelu_exact(linear(state, f"{block}.linear1", x)))
    x = layer_norm(state, "classifier.norm", x)
    if "classifier.class_emb" in state:
        return linear(state, "classifier.fc", x[:, 0])
    weights = softmax(linear(state, "classifier.attention_pool", x), 1)
    return linear(state, "classifier.fc", (weights * x).sum(1))


def seed_state(depth: int = 4, dim: int = 48, heads: int = 4, merged: bool = False, bias: bool = True) -> StateDict:
    """Random weights under the upstream's names, large enough that every term matters."""
    state = {
        "embedding.cls_token": torch.randn(1, 1, dim),
        "embedding.position_embeddings": torch.randn(1, 65, dim),
        "embedding.patch_embeddings.projection.weight": torch.randn(dim, 3, 4, 4) * 0.2,
        "embedding.patch_embeddings.projection.bias": torch.randn(dim),
        **_linear("classifier", 10, dim),
    }
    for i in range(depth):
        block = f"encoder.blocks.{i}"
        if merged:
            state |= _linear(f"{block}.attention.qkv_projection", 3 * dim, dim, bias)
        else:
            for head in range(heads):
                for name in ("query", "key", "value"):
                    state |= _linear(f"{block}.attention.heads.{head}.{name}", dim // heads, dim, bias)
        state |= _linear(f"{block}.attention.output_projection", dim, dim)
        state |= _norm(f"{block}.layernorm_1", dim) | _norm(f"{block}.layernorm_2", dim)
        state |= _linear(f"{block}.mlp.dense_1", 4 * dim, dim) | _linear(f"{block}.mlp.dense_2", dim, 4 * dim)
    return state


def compact_state(depth: int, dim: int, hidden: int, tokens: int, convs: int, cls: bool) -> StateDict:
    """Random weights under the compact family's names."""
    state = {"classifier.positional_emb": torch.randn(1, tokens + cls, dim), **_linear("classifier.fc", 10, dim)}
    state |= _norm("classifier.norm", dim)
    if cls:
        state["classifier.class_emb"] = torch.randn(1, 1, dim)
    else:
        state |= _linear("classifier.attention_pool", 1, dim)
    if convs:
        channels = [3, *[64] * (convs - 1), dim]
        for i in range(convs):
            weight = torch.randn(channels[i + 1], channels[i], 3, 3) * (9 * channels[i]) ** -0.5
            state[f"tokenizer.conv_layers.{i}.0.weight"] = weight
    else:
        state["tokenizer.conv_layers.0.0.weight"] = torch.randn(dim, 3, 4, 4) * 0.2
        state["tokenizer.conv_layers.0.0.bias"] = torch.randn(dim)
    for i in range(depth):
        block = f"classifier.blocks.{i}"
        state |= _linear(f"{block}.self_attn.qkv", 3 * dim, dim, bias=False) | _linear(
            f"{block}.self_attn.proj", dim, dim
        )
        state |= _norm(f"{block}.pre_norm", dim) | _norm(f"{block}.norm1", dim)
        state |= _linear(f"{block}.linear1", hidden, dim) | _linear(f"{block}.linear2", dim, hidden)
    return state


def _linear(name: str, out: int, into: int, bias: bool = True) -> StateDict:
    weight = {f"{name}.weight": torch.randn(out, into) * into**-0.5}
    return {**weight, f"{name}.bias": torch.randn(out)} if bias else weight


def _norm(name: str, dim: int) -> StateDict:
    return {f"{name}.weight": torch.randn(dim), f"{name}.bias": torch.randn(dim)}
