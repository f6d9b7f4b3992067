"""The shape of the model, as data: one dataclass, from a recipe or from EVE's own ``config_vlmo*.json``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from preprocessing.errors import UserError, listed, shortened
from preprocessing.local_files import check_regular, load_json

Activation = Literal["gelu", "quick_gelu"]
MOST = 1 << 20  # of blocks, experts, entries of a vocabulary ...
_POSITIVE = (
    "image_size", "patch_size", "dim", "depth", "num_heads", "mlp_hidden", "vocab_size", "text_positions",
    "num_experts",
)  # fmt: skip
# The keys of EVE's config_vlmo*.json. Those that its code computes with, the one value of others that makes this model,
# and those that change nothing in it.
_VLMO_USED = (
    "vision_width", "patch_size", "hidden_act", "num_attention_heads", "intermediate_size", "num_hidden_layers",
    "gradient_checkpointing", "drop_path_rate", "vocab_size", "moeffn_layers", "moe_param", "moe_lossweight",
)  # fmt: skip
_VLMO_FIXED = {
    "attention_dropout": 0,
    "relative_position_embed": False,
    "single_ffn": {"type": "vl"},
    "ffn_type": "moe",
}
_VLMO_WHY = {
    "ffn_type": " whose last blocks hold a network for pairs, and others for images and for texts alone (nearest here: "
    "model.shared_layers, one network for all)",
    "single_ffn": " whose first blocks hold one network, or experts, for both modalities (nearest here: "
    "model.shared_layers and model.soft_layers)",
}
_VLMO_IDLE = {"vision_vocab_size": "of visual tokens", "vlffn_layers": 'of ffn_type "vl"'}
_VLMO_MOE = ("num_experts", "topk", "type_route")
_log = logging.getLogger(__name__)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass
class ModelConfig:
    """EVE's backbone (arXiv 2308.11971, section 3). The defaults are EVE-Base.

    Args:
        image_size: side of the square images, pixels; a multiple of ``patch_size``.
        patch_size: side of a patch, pixels.
        dim: width D of the token vectors.
        depth: number of Transformer blocks.
        num_heads: attention heads; divides ``dim``.
        mlp_hidden: hidden width H of the feed-forward networks and of the experts.
        vocab_size: word pieces, special tokens included.
        max_text_length: longest text, tokens, [CLS] and [SEP] included; longer ones are cut.
        text_positions: rows of the learned text position table (the published files have 196).
        soft_layers: indices of the blocks that route softly among experts; all others but ``shared_layers`` route hard
            by modality. An empty list: all of them.
        shared_layers: indices of the blocks with one feed-forward network for both modalities, which route nothing.
        num_experts: experts E of a softly routing block.
        top_k: experts that a token visits there.
        capacity_factor: None drops no token; a number limits an expert to ceil(k T / E x factor) tokens, at least 4.
        modality_routing: the router sees token + a learned vector of the token's modality. False: there are no such
            vectors, and router and experts see the token alone.
        modality_to_experts: experts see token + modality vector (as the published files need), not the router alone;
            without effect if ``modality_routing`` is False.
        activation: of all feed-forward networks.
        drop_path: largest probability of dropping a residual branch; rises linearly with depth.
        layer_scale: first value of the learned per-channel scale on each residual branch.
        init_std: deviation of first weights; 0.02 as BEiT and EVE; narrow models learn sooner with about dim ** -0.5.
        position_std: deviation of first positions, type vectors and class token; 0.02 as BEiT and EVE.
        norm_eps: epsilon of every LayerNorm in the backbone.
        aux_loss_weight: weight of the load-balancing loss in the training loss; 0 logs it and trains without it.
        router_z_loss_weight: weight of the router z-loss in the training loss, the mean over tokens of the squared
            logsumexp of the router's scores (ST-MoE, arXiv 2202.08906, equation 5; there 0.001). 0: not computed.
        router_jitter: in training multiply what the router sees, number by number, by uniform noise between
            1 - router_jitter and 1 + router_jitter (Switch Transformers, arXiv 2101.03961; there 0.01). 0: none.
        checkpoint_activations: recompute each block in the backward pass to save memory.
    """

    image_size: int = 224
    patch_size: int = 16
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_hidden: int = 3072
    vocab_size: int = 64000
    max_text_length: int = 40
    text_positions: int = 196
    soft_layers: list[int] = field(default_factory=lambda: [10, 11])
    shared_layers: list[int] = field(default_factory=list)
    num_experts: int = 32
    top_k: int = 2
    capacity_factor: float | None = None
    modality_routing: bool = True
    modality_to_experts: bool = True
    activation: Activation = "quick_gelu"
    drop_path: float = 0.1
    layer_scale: float = 0.1
    init_std: float = 0.02
    position_std: float = 0.02
    norm_eps: float = 1e-6
    aux_loss_weight: float = 0.001
    router_z_loss_weight: float = 0.0
    router_jitter: float = 0.0
    checkpoint_activations: bool = False

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def check(self) -> None:
        """Raise UserError naming the first field that makes no model."""
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least 1")
            if getattr(self, name) > MOST:
                raise UserError(f"model.{name}={getattr(self, name)} is beyond all models; at most {MOST}")
        for name in ("init_std", "position_std", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"model.{name}={getattr(self, name)} must be a finite number above 0")
        for name in ("layer_scale", "aux_loss_weight", "router_z_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"model.{name}={getattr(self, name)} must be a finite number, 0 or more")
        if self.image_size % self.patch_size:
            raise UserError(
                f"model.image_size={self.image_size} is not a multiple of model.patch_size={self.patch_size}"
            )
        if self.dim % self.num_heads:
            raise UserError(f"model.dim={self.dim} is not a multiple of model.num_heads={self.num_heads}")
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(f"model.top_k={self.top_k} must lie between 1 and model.num_experts={self.num_experts}")
        if not 3 <= self.max_text_length <= self.text_positions:
            raise UserError(
                f"model.max_text_length={self.max_text_length} must lie between 3 and"
                f" model.text_positions={self.text_positions}"
            )
        for name in ("soft_layers", "shared_layers"):
            layers = getattr(self, name)
            if any(not 0 <= i < self.depth for i in layers) or len(set(layers)) != len(layers):
                raise UserError(f"model.{name}={layers} must be distinct indices below model.depth={self.depth}")
        if both := sorted(set(self.soft_layers) & set(self.shared_layers)):
            raise UserError(
                f"model.shared_layers={self.shared_layers} and model.soft_layers={self.soft_layers} both hold {both}; "
                "a block is one or the other"
            )
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise UserError(
                f"model.capacity_factor={self.capacity_factor} must be positive and finite, or null to drop no token"
            )
        for name in ("drop_path", "router_jitter"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least 0 and below 1")

    @classmethod
    def from_vlmo(
        cls, path: str | Path, image_size: int | None = None, tell: Callable[[str], object] = _log.debug
    ) -> ModelConfig:
        """Read EVE's published ``config_vlmo*.json``.

        Args:
            path: the file.
            image_size: images' side, which that file does not hold (it stands in EVE's task configs); default 224.
            tell: is given a line that names the keys without effect, if there are some.
        Raises:
            UserError: unreadable, a key is missing or unknown, or the file describes a model that is not EVE's.
        """
        check_regular(path, streams=True)
        try:
            raw = load_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable JSON file ({error})") from error
        moe = raw.get("moe_param") if isinstance(raw, dict) else None
        if not isinstance(moe, dict):
            raise UserError(f"{path}: not a config_vlmo JSON file, the object 'moe_param' is missing")
        try:
            config = cls(
                image_size=image_size or 224,
                patch_size=raw["patch_size"],
                dim=raw["vision_width"],
                depth=raw["num_hidden_layers"],
                num_heads=raw["num_attention_heads"],
                mlp_hidden=raw["intermediate_size"],
                vocab_size=raw["vocab_size"],
                soft_layers=raw["moeffn_layers"],
                num_experts=moe["num_experts"],
                top_k=moe["topk"],
                activation=raw["hidden_act"],
                drop_path=raw["drop_path_rate"],
                aux_loss_weight=raw.get("moe_lossweight", 0.001),
                modality_routing=moe.get("type_route", False),
                checkpoint_activations=raw.get("gradient_checkpointing", False),
            )
        except KeyError as error:
            raise UserError(f"{path}: not a config_vlmo JSON file, {error} is missing") from error
        for name in (*_POSITIVE, "top_k"):
            if not _is_whole(getattr(config, name)):
                raise UserError(f"{path}: {name} is {shortened(repr(getattr(config, name)))}, not a whole number")
        for name in ("drop_path", "aux_loss_weight"):
            if not isinstance(getattr(config, name), int | float):
                raise UserError(f"{path}: {name} is {getattr(config, name)!r}, not a number")
        if not isinstance(config.soft_layers, list) or not all(map(_is_whole, config.soft_layers)):
            raise UserError(f"{path}: moeffn_layers={shortened(repr(config.soft_layers))} is no list of whole numbers")
        if config.activation not in ("gelu", "quick_gelu"):
            raise UserError(f"{path}: hidden_act={config.activation!r} must be gelu or quick_gelu")
        for name in ("modality_routing", "checkpoint_activations"):
            if not isinstance(getattr(config, name), bool):
                raise UserError(f"{path}: {name} is {shortened(repr(getattr(config, name)))}, neither true nor false")
        config.check()
        if idle := _check_vlmo(path, raw, moe):
            tell(f"{path}: without effect on this model: {', '.join(idle)}")
        return config


def _check_vlmo(path: str | Path, raw: dict[str, Any], moe: dict[str, Any]) -> list[str]:
    """Those keys of EVE's JSON that have no effect. Raises UserError for one that is unknown or makes another model."""
    unknown = [key for key in raw if key not in (*_VLMO_USED, *_VLMO_FIXED, *_VLMO_IDLE)]
    unknown += [f"moe_param.{key}" for key in moe if key not in _VLMO_MOE]
    if unknown:
        raise UserError(
            f"{path}: {listed(unknown)}: no key of EVE's JSON that is known; delete it, or correct its name"
        )
    for key, value in _VLMO_FIXED.items():
        if raw.get(key, value) != value:
            raise UserError(
                f"{path}: {key}={shortened(repr(raw[key]))} is not EVE's model, which has {value!r}, but one"
                f"{_VLMO_WHY.get(key, f' with that {key}')}"
            )
    return [f"{key} ({why})" for key, why in _VLMO_IDLE.items() if key in raw]
