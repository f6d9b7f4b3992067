"""Initialize a pre-training run from BEiT v2 (Peng et al. 2022, arXiv 2208.06366), an image model.

Names and shapes are those of microsoft/unilm's beit2/modeling_pretrain.py and modeling_finetune.py. How EVE's authors
initialized their training is not published; that they used BEiT v2 is not confirmed. The mapping is our choice and
follows VLMo (Bao et al. 2022, arXiv 2111.02358) and sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055):
attention is copied; the feed-forward network of a block, and the LayerNorm before it, are copied to the image network,
the text network, or each expert. Experts start equal and diverge through routing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eve_ds.model.backbone import Backbone
from eve_ds.model.block import HardBlock, SoftBlock
from eve_ds.weights.load import interpolate_positions
from preprocessing.errors import UserError, listed

# Absolute positions, biases, LayerScale and the final norm are optional in unilm's model.
OPTIONAL = ("pos_embed", "norm.weight", "norm.bias", "attn.q_bias", "attn.v_bias", "gamma_1", "gamma_2")
NOT_TAKEN = (
    (re.compile(r"relative_position"), "relative positions; EVE's are absolute"),
    (re.compile(r"^(mask_token$|lm_head\.|cls_pt_)"), "of BEiT's own pre-training objective"),
    (re.compile(r"^(head|fc_norm)\."), "of an image classifier"),
    (re.compile(r"^(cls_token|pos_embed|patch_embed|norm|blocks)\b"), "has no place in EVE"),
    (re.compile(r""), "not a name of BEiT v2"),
)
_BIAS_TABLE = "relative_position_bias_table"  # [distances, heads]
_ATTENTION = {
    "norm1.weight": "attention_norm.weight",
    "norm1.bias": "attention_norm.bias",
    "attn.qkv.weight": "attention.qkv.weight",
    "attn.q_bias": "attention.qkv.q_bias",
    "attn.v_bias": "attention.qkv.v_bias",
    "attn.proj.weight": "attention.proj.weight",
    "attn.proj.bias": "attention.proj.bias",
    "gamma_1": "attention_scale",
    "gamma_2": "mlp_scale",
}
_NETWORK = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")

Target = tuple[str, Tensor]  # EVE-DS name, and the part of that parameter to fill


@dataclass(frozen=True)
class Origins:
    """Origin of each tensor of an initialized model.

    Attributes:
        taken: {BEiT name: EVE-DS names}, the copied tensors.
        left: {BEiT name: reason}, the tensors of the file that were not copied.
        new: {EVE-DS name: its content}, the tensors of the model that the file does not have.
    """

    taken: dict[str, list[str]]
    left: dict[str, str]
    new: dict[str, str]

    def lines(self) -> list[str]:
        """The three lists, one line per tensor."""
        lines = [f"taken: {len(self.taken)} tensors of the file"]
        lines += [f"  {theirs} -> {', '.join(ours)}" for theirs, ours in self.taken.items()]
        lines += [f"left: {len(self.left)} tensors of the file"]
        lines += [f"  {theirs}: {reason}" for theirs, reason in self.left.items()]
        lines += [f"new: {len(self.new)} tensors of the model"]
        return lines + [f"  {ours}: {what}" for ours, what in self.new.items()]


@torch.no_grad()
def fill_from_beit(backbone: Backbone, state: Mapping[str, Tensor]) -> Origins:
    """Copy a BEiT v2 state into a backbone; parameters that BEiT does not have keep their values.

    Absolute positions are interpolated to the backbone's image size. If the file has no LayerScale, it is set to 1,
    which is the same function. BEiT's networks use GELU; ``activation: quick_gelu`` approximates it.

    Args:
        backbone: with all experts (``ep_size`` 1), on the CPU.
        state: names as in unilm's files.
    Raises:
        UserError: not BEiT v2, or of another size; all mismatches are named.
    """
    _check_blocks(backbone, state)
    targets = _targets(backbone)
    missing = [name for name in targets if name not in state and not name.endswith(OPTIONAL)]
    if missing:
        raise UserError(f"not a BEiT v2 model (names of microsoft/unilm beit2); missing: {listed(missing)}")
    own = {name: _as_ours(name, tensor, backbone) for name, tensor in state.items() if name in targets}
    wrong = [
        f"{name} is {list(state[name].shape)}, the model has {list(_one_network(targets[name][0]).shape)}"
        for name, value in own.items()
        if any(value.shape != _one_network(target).shape for target in targets[name])
    ]
    if wrong:
        raise UserError(f"of another size than the model; {listed(wrong)}")
    taken = {}
    for name, value in own.items():
        for _, part in targets[name]:
            part.copy_(value)
        taken[name] = [ours for ours, _ in targets[name]]
    filled = {ours for names in taken.values() for ours in names}
    new = {name: "initial values" for name, _ in backbone.named_parameters() if name not in filled}
    for theirs in ("gamma_1", "gamma_2"):
        for name in (name for name in targets if name.endswith(theirs) and name not in state):
            ours, part = targets[name][0]
            part.fill_(1.0)
            new[ours] = "1, since the file has no LayerScale"
    left = {name: _reason_not_taken(name) for name in state if name not in taken}
    return Origins(taken, left, new)


def _targets(backbone: Backbone) -> dict[str, list[Target]]:
    """{BEiT name: parameters to fill}. Parts of expert parameters have a leading dimension E."""
    image = backbone.image_embedding
    targets: dict[str, list[Target]] = {
        "cls_token": [("image_embedding.class_token", image.class_token.view(1, 1, -1))],
        "pos_embed": [("image_embedding.positions", image.positions.unsqueeze(0))],
        "patch_embed.proj.weight": [("image_embedding.projection.weight", image.projection.weight)],
        "norm.weight": [("norm.weight", backbone.norm.weight)],
        "norm.bias": [("norm.bias", backbone.norm.bias)],
    }
    if image.projection.bias is not None:
        targets["patch_embed.proj.bias"] = [("image_embedding.projection.bias", image.projection.bias)]
    for index, block in enumerate(backbone.blocks):
        names = {theirs: [ours] for theirs, ours in _ATTENTION.items()}
        soft = isinstance(block, SoftBlock)
        networks = ("image", "text") if isinstance(block, HardBlock) else ("moe",) if soft else ("shared",)
        for kind in ("weight", "bias"):
            names[f"norm2.{kind}"] = [f"{network}_norm.{kind}" for network in networks]
        if not soft:
            names |= {f"mlp.{name}": [f"{network}_mlp.{name}" for network in networks] for name in _NETWORK}
        for theirs, ours in names.items():
            targets[f"blocks.{index}.{theirs}"] = [(f"blocks.{index}.{o}", block.get_parameter(o)) for o in ours]
        if soft:
            w1, w2, w3 = (block.get_parameter(f"moe.experts.{name}") for name in ("w1", "w2", "w3"))
            hidden = w1.shape[1]
            parts = {"fc1.weight": w1, "fc2.weight": w2, "fc1.bias": w3[:, 0, :hidden], "fc2.bias": w3[:, 0, hidden:]}
            for theirs, part in parts.items():
                packed = {"fc1.weight": "w1", "fc2.weight": "w2"}.get(theirs, "w3")
                targets[f"blocks.{index}.mlp.{theirs}"] = [(f"blocks.{index}.moe.experts.{packed}", part)]
    return targets


def _one_network(target: Target) -> Tensor:
    """The part for a single network: that of the first expert, if it is for experts."""
    name, part = target
    return part[0] if ".moe.experts." in name else part


def _as_ours(name: str, tensor: Tensor, backbone: Backbone) -> Tensor:
    if name == "pos_embed" and tensor.ndim == 3 and tensor.shape[0] == 1:
        return interpolate_positions(tensor[0], backbone.config.num_patches).unsqueeze(0)
    return tensor


def _check_blocks(backbone: Backbone, state: Mapping[str, Tensor]) -> None:
    """Check the numbers of blocks and attention heads, which are not visible in the shapes of the copied tensors."""
    config = backbone.config
    blocks = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    if blocks and max(blocks) + 1 != config.depth:
        raise UserError(f"of another size than the model; it has {max(blocks) + 1} blocks, model.depth={config.depth}")
    for name, tensor in state.items():
        if name.endswith(_BIAS_TABLE) and tensor.ndim == 2 and tensor.shape[1] != config.num_heads:
            raise UserError(
                f"of another size than the model; {name} is for {tensor.shape[1]} attention heads,"
                f" model.num_heads={config.num_heads}"
            )


def _reason_not_taken(name: str) -> str:
    return next(reason for pattern, reason in NOT_TAKEN if pattern.search(name))
