"""EVE's model and losses (arXiv 2308.11971), slow and plain: float64, one sample and one token at a time.

It takes the weights by name and calls no module of the project. Sizes are those of ``tests/support/tiny.py``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH, SIDE, PLACES, LAYERS, HEADS, DECODER_DIM, EPS = 8, 4, 16, 3, 4, 32, 1e-6
Weights = dict[str, Tensor]  # all weights by name; x is one token [D]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return normalized(x) * w[f"{name}.weight"] + w[f"{name}.bias"]


def normalized(x: Tensor) -> Tensor:
    return (x - x.mean()) / ((x - x.mean()).square().mean() + EPS).sqrt()


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def attention(w: Weights, block: str, tokens: list[Tensor]) -> list[Tensor]:
    """What each token adds to itself. Nothing is hidden: padding is not among the tokens."""
    name, dim = f"{block}.attention", len(tokens[0])
    bias = torch.cat([w[f"{name}.qkv.q_bias"], torch.zeros(dim), w[f"{name}.qkv.v_bias"]])
    rows = torch.stack([w[f"{name}.qkv.weight"] @ norm(w, f"{name}_norm", x) + bias for x in tokens])
    out = []
    for row in rows:
        heads = []
        for head in torch.arange(dim).chunk(HEADS):
            query, keys, values = row[head], rows[:, dim + head], rows[:, 2 * dim + head]
            heads.append((keys @ query / math.sqrt(len(head))).softmax(0) @ values)
        out.append(linear(w, f"{name}.proj", torch.cat(heads)))
    return out


def mixture(w: Weights, name: str, x: Tensor, kind: str, to_experts: bool) -> tuple[Tensor, Tensor]:
    """The two best of the experts, weighted by their gates; and all gates."""
    seen = x + w[f"{name}.{kind}_vector"]
    gates = (w[f"{name}.router.weight"] @ seen).softmax(0)
    best = gates.argsort(descending=True).tolist()
    assert gates[best[1]] - gates[best[2]] > 1e-5  # else float32 could choose another expert
    out, total = torch.zeros_like(x), gates[best[0]] + gates[best[1]]
    for expert in best[:2]:
        w1, w2, biases = (w[f"{name}.experts.{part}"][expert] for part in ("w1", "w2", "w3"))
        middle = quick_gelu(w1 @ (seen if to_experts else x) + biases[0, : len(w1)])
        out = out + gates[expert] / total * (w2 @ middle + biases[0, len(w1) :])
    return out, gates


def window(place: int) -> tuple[slice, slice, slice]:
    y, x = divmod(place, SIDE)
    return slice(None), slice(PATCH * y, PATCH * (y + 1)), slice(PATCH * x, PATCH * (x + 1))


def encode(
    w: Weights, image: Tensor | None, keep: list[int], ids: list[int], to_experts: bool = True
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """States of the class token, the patches in ``keep`` and the words; gates[soft layer][token].

    Without an image there is no class token.
    """
    name = "backbone.image_embedding"
    tokens = []
    if image is not None:
        tokens.append(w[f"{name}.class_token"] + w[f"{name}.positions"][0] + w[f"{name}.type_vector"])
    for place in keep:
        assert image is not None
        pixels = image[window(place)].flatten()
        patch = w[f"{name}.projection.weight"].flatten(1) @ pixels + w[f"{name}.projection.bias"]
        tokens.append(patch + w[f"{name}.positions"][1 + place] + w[f"{name}.type_vector"])
    name = "backbone.text_embedding"
    for place, word in enumerate(ids):
        vector = norm(w, f"{name}.norm", w[f"{name}.words.weight"][word])
        tokens.append(vector + w[f"{name}.positions"][place] + w[f"{name}.type_vector"])
    tokens = [norm(w, "backbone.embedding_norm", x) for x in tokens]
    kinds = ["image"] * (len(tokens) - len(ids)) + ["text"] * len(ids)
    routed = []
    for name in (f"backbone.blocks.{layer}" for layer in range(LAYERS)):
        branches = attention(w, name, tokens)
        tokens = [x + w[f"{name}.attention_scale"] * y for x, y in zip(tokens, branches, strict=True)]
        if f"{name}.moe_norm.weight" in w:
            pairs = zip(kinds, tokens, strict=True)
            both = [mixture(w, f"{name}.moe", norm(w, f"{name}.moe_norm", x), kind, to_experts) for kind, x in pairs]
            branches = [branch for branch, _ in both]
            routed.append([gates for _, gates in both])
        else:
            own = [f"{name}.{kind}" for kind in kinds]
            pairs = zip(own, tokens, strict=True)
            middle = [quick_gelu(linear(w, f"{part}_mlp.fc1", norm(w, f"{part}_norm", x))) for part, x in pairs]
            branches = [linear(w, f"{part}_mlp.fc2", y) for part, y in zip(own, middle, strict=True)]
        tokens = [x + w[f"{name}.mlp_scale"] * y for x, y in zip(tokens, branches, strict=True)]
    return [norm(w, "backbone.norm", x) for x in tokens], routed


def grid_position(place: int) -> Tensor:
    """Sine and cosine of the row, then of the column (MAE's decoder)."""
    quarter = DECODER_DIM // 4
    frequency = 1 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    return torch.cat([f(axis * frequency) for axis in divmod(place, SIDE) for f in (torch.sin, torch.cos)])


def rebuild(w: Weights, visible: list[Tensor], keep: list[int], masked: list[int]) -> list[Tensor]:
    """Pixels of each masked patch, from the class token, the visible patches and a mask token for each."""
    tokens = [linear(w, "pixel_decoder.embed", x) for x in visible]
    tokens[1:] = [x + grid_position(place) for x, place in zip(tokens[1:], keep, strict=True)]
    tokens += [w["pixel_decoder.mask_token"] + grid_position(place) for place in masked]
    name = "pixel_decoder.blocks.0"
    tokens = [x + y for x, y in zip(tokens, attention(w, name, tokens), strict=True)]
    middle = [F.gelu(linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.mlp_norm", x))) for x in tokens]
    tokens = [x + linear(w, f"{name}.mlp.fc2", y) for x, y in zip(tokens, middle, strict=True)]
    return [linear(w, "pixel_decoder.head", norm(w, "pixel_decoder.norm", x)) for x in tokens[len(visible) :]]


def word_scores(w: Weights, state: Tensor) -> Tensor:
    """The paper's two-layer MLP where the weights are there, else BERT's head over the word embedding."""
    if "word_decoder.projection.weight" in w:
        return linear(w, "word_decoder.projection", F.gelu(linear(w, "word_decoder.dense", state)))
    hidden = norm(w, "word_decoder.norm", F.gelu(linear(w, "word_decoder.dense", state)))
    return w["backbone.text_embedding.words.weight"] @ hidden + w["word_decoder.bias"]


def balance(passes: list[list[list[list[Tensor]]]]) -> Tensor:
    """Mean over passes and layers of E x sum of an expert's mean gate x its share of first choices; over all tokens.

    Gates are passes[pass][row][layer][token].
    """
    losses = [torch.zeros(0)]
    for layer in (layer for rows in passes for layer in zip(*rows, strict=True)):
        gates = torch.stack([gate for row in layer for gate in row])
        shares = F.one_hot(gates.argmax(dim=1), gates.shape[1]).double().mean(dim=0)
        losses.append(gates.shape[1] * (gates.mean(dim=0) * shares).sum()[None])
    return torch.cat(losses).sum() / max(1, len(losses) - 1)
