"""Published EVE checkpoints (github.com/ssyze/EVE): their config, completed by the shapes of the tensors, and their
names <-> names of EVE-DS, both ways.

All of the backbone is renamed, and the experts of a layer, one by one in a published file, are packed into w1, w2, w3.
Names outside ``backbone.`` (the heads) are the same in both, but for the contrastive and matching heads of
pre-training, which become those of retrieval (``retrieval_heads``) and stay so on the way back.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from eve_ds.model.experts import pack_biases, split_biases
from eve_ds.model.model_config import ModelConfig
from eve_ds.weights.load import POSITIONS
from preprocessing.errors import UserError, listed

PREFIX = "backbone."

_TOP = {
    "class_embedding_vision": "image_embedding.class_token",
    "patch_embed.weight": "image_embedding.projection.weight",
    "patch_embed.bias": "image_embedding.projection.bias",
    "pos_embed_vision": "image_embedding.positions",
    "type_embed_vision": "image_embedding.type_vector",
    "word_embedding.weight": "text_embedding.words.weight",
    "pos_embed_text": "text_embedding.positions",
    "type_embed_text": "text_embedding.type_vector",
    "layer_norm_text.weight": "text_embedding.norm.weight",
    "layer_norm_text.bias": "text_embedding.norm.bias",
    "pre_layrnorm.weight": "embedding_norm.weight",
    "pre_layrnorm.bias": "embedding_norm.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}
_LAYER = {
    "gamma_1": "attention_scale",
    "gamma_2": "mlp_scale",
    "norm1.weight": "attention_norm.weight",
    "norm1.bias": "attention_norm.bias",
    "attn.q_bias": "attention.qkv.q_bias",
    "attn.v_bias": "attention.qkv.v_bias",
    "attn.qkv.weight": "attention.qkv.weight",
    "attn.proj.weight": "attention.proj.weight",
    "attn.proj.bias": "attention.proj.bias",
}
_HARD = {
    f"{theirs}.{name}": f"{ours}.{name}"
    for modality in (("imag", "image"), ("text", "text"))
    for theirs, ours, names in (
        (f"norm2_{modality[0]}", f"{modality[1]}_norm", ("weight", "bias")),
        (f"mlp_{modality[0]}", f"{modality[1]}_mlp", ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")),
    )
    for name in names
}
_SHARED = {  # with the names of the published code's ``ffn_type: "vl"``, which EVE did not use
    "norm2_vl.weight": "shared_norm.weight",
    "norm2_vl.bias": "shared_norm.bias",
} | {f"mlp_vl.{name}": f"shared_mlp.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
_SOFT = {
    "norm2_vl.weight": "moe_norm.weight",
    "norm2_vl.bias": "moe_norm.bias",
    "mlp_moe.moe.gate.wg.weight": "moe.router.weight",
}
_MODALITY = {
    "mlp_moe.moe.vision_embed": "moe.image_vector",
    "mlp_moe.moe.text_embed": "moe.text_vector",
}
_EXPERT = ("fc1.weight", "fc2.weight", "fc1.bias", "fc2.bias")
TEMPERATURE = "itc_temp"
# What EVE's retrieval code takes its heads from where --load_head asks for them (model_retrieval_beit.py), a later one
# in the place of an earlier one.
_RETRIEVAL = {
    "mitc_temp": TEMPERATURE,
    "mitc_vision_proj_head.weight": "itc_vision_proj_head.weight",
    "mitc_text_proj_head.weight": "itc_text_proj_head.weight",
    "itc_vl_vision_proj_head.weight": "itc_vision_proj_head.weight",
    "itc_vl_text_proj_head.weight": "itc_text_proj_head.weight",
    "mitm_head.weight": "itm_head.weight",
    "mitm_head.bias": "itm_head.bias",
}
# Names in published files and in EVE-DS.
IMAGE_POSITIONS = ("backbone.pos_embed_vision", POSITIONS)
TEXT_POSITIONS = ("backbone.pos_embed_text", "backbone.text_embedding.positions")
_log = logging.getLogger(__name__)


def direct_names(config: ModelConfig) -> dict[str, str]:
    """Published name -> EVE-DS name of every tensor that is only renamed."""
    names = {PREFIX + theirs: PREFIX + ours for theirs, ours in _TOP.items()}
    for index in range(config.depth):
        for theirs, ours in (_LAYER | _feed_forward(config, index)).items():
            names[f"{PREFIX}encoder.layers.{index}.{theirs}"] = f"{PREFIX}blocks.{index}.{ours}"
    return names


def _feed_forward(config: ModelConfig, index: int) -> dict[str, str]:
    if index in config.soft_layers:
        return _SOFT | _MODALITY if config.modality_routing else _SOFT
    return _SHARED if index in config.shared_layers else _HARD


def expert_prefixes(config: ModelConfig) -> dict[str, list[str]]:
    """EVE-DS prefix of a layer's experts -> published prefix of each expert."""
    return {
        f"{PREFIX}blocks.{index}.moe.experts.": [
            f"{PREFIX}encoder.layers.{index}.mlp_moe.moe.experts.experts.{expert}."
            for expert in range(config.num_experts)
        ]
        for index in config.soft_layers
    }


def position_ids(config: ModelConfig) -> dict[str, Tensor]:
    """The constants 0, 1, 2, ... that published files hold beside weights: for texts [196], for images [1, 1 + P]."""
    return {
        PREFIX + "position_ids_text": torch.arange(config.text_positions),
        PREFIX + "position_ids_vision": torch.arange(1 + config.num_patches).unsqueeze(0),
    }


def is_published(state: dict[str, Tensor]) -> bool:
    """Whether the names are those of a published EVE file."""
    return any(name.startswith(PREFIX + "encoder.layers.") for name in state)


def retrieval_heads(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with the contrastive and matching heads of pre-training, ``mitc_*``, ``itc_vl_*`` and ``mitm_head.*``,
    under the names of retrieval's, ``itc_*`` and ``itm_head.*``; they replace what has these names already."""
    found = {ours: state[theirs] for theirs, ours in _RETRIEVAL.items() if theirs in state}
    return {name: tensor for name, tensor in state.items() if name not in _RETRIEVAL} | found


def from_published(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename and pack a published state.

    Args:
        state: whole model or backbone, names with ``backbone.`` as in the files; other names are kept, but for those
            that ``retrieval_heads`` replaces.
        config: the model it belongs to.
    Raises:
        UserError: backbone tensors are missing or unknown (all are listed), the experts of a layer differ in shape
            or dtype, or position ids are not 0, 1, 2, ....
    """
    if max(config.depth, config.num_experts) > len(state):
        raise UserError(
            f"holds {len(state)} tensors, too few for a model of {config.depth} blocks and {config.num_experts} experts"
        )
    direct, packed = direct_names(config), expert_prefixes(config)
    expected = set(direct) | {prefix + name for prefixes in packed.values() for prefix in prefixes for name in _EXPERT}
    constants = position_ids(config)
    _check(state, expected, set(constants))
    for name in constants.keys() & state.keys():
        if state[name].flatten().tolist() != list(range(state[name].numel())):
            raise UserError(f"{name}: positions are not 0, 1, 2, ... in order, as EVE-DS takes them")
    ours = {direct.get(name, name): tensor for name, tensor in state.items() if _kept(name, direct)}
    for prefix, experts in packed.items():
        fc1, fc2 = (_stack(state, experts, name, 2) for name in ("fc1.weight", "fc2.weight"))
        bias1, bias2 = (_stack(state, experts, name, 1) for name in ("fc1.bias", "fc2.bias"))
        ours |= {prefix + "w1": fc1, prefix + "w2": fc2, prefix + "w3": pack_biases(bias1, bias2)}
    return _reshaped(retrieval_heads(ours), (1,))


def _stack(state: dict[str, Tensor], experts: list[str], name: str, dims: int) -> Tensor:
    """[E, ...]: the tensor of that name of each expert."""
    tensors = [state[expert + name] for expert in experts]
    first = tensors[0]
    for expert, tensor in zip(experts, tensors, strict=True):
        if tensor.ndim != dims or tensor.shape != first.shape or tensor.dtype != first.dtype:
            raise UserError(
                f"{expert}{name} is {tensor.dtype} {list(tensor.shape)}, unlike {experts[0]}{name},"
                f" {first.dtype} {list(first.shape)}"
            )
    return torch.stack(tensors)


def to_published(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The way back; adds the constant position ids that published files hold.

    Args:
        state: EVE-DS names, all experts in each w1, w2, w3; names outside ``backbone.`` are kept.
    Raises:
        UserError: backbone tensors are missing or unknown (all are listed).
    """
    direct = {ours: theirs for theirs, ours in direct_names(config).items()}
    packed = expert_prefixes(config)
    _check(state, set(direct) | {prefix + name for prefix in packed for name in ("w1", "w2", "w3")}, set())
    published = {direct.get(name, name): tensor for name, tensor in state.items() if _kept(name, direct)}
    for prefix, experts in packed.items():
        fc1, fc2 = state[prefix + "w1"], state[prefix + "w2"]
        parts = (fc1, fc2, *split_biases(state[prefix + "w3"], fc1.shape[1]))
        for index, expert in enumerate(experts):
            published |= {expert + name: part[index].clone() for name, part in zip(_EXPERT, parts, strict=True)}
    return _reshaped(published, ()) | position_ids(config)


def _reshaped(state: dict[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The temperature is a scalar in published files; here a vector of one: DeepSpeed broadcasts no bf16 scalar."""
    if TEMPERATURE in state and state[TEMPERATURE].numel() == 1:
        return state | {TEMPERATURE: state[TEMPERATURE].reshape(shape)}
    return state


def _kept(name: str, direct: dict[str, str]) -> bool:
    return name in direct or not name.startswith(PREFIX)


def _check(state: dict[str, Tensor], expected: set[str], optional: set[str]) -> None:
    given = {name for name in state if name.startswith(PREFIX)}
    faults = []
    if expected - given:
        faults.append(f"missing: {listed(expected - given)}")
    if given - expected - optional:
        faults.append(f"unknown: {listed(given - expected - optional)}")
    if faults:
        raise UserError(f"the weights are not those of this model; {'; '.join(faults)}")


def published_config(
    vlmo_config: str | Path,
    state: Mapping[str, Tensor],
    image_size: int | None = None,
    tell: Callable[[str], object] = _log.debug,
) -> ModelConfig:
    """Read the ``config_vlmo*.json`` of published weights.

    Args:
        vlmo_config: the JSON file.
        state: published or EVE-DS names.
        image_size: side of an image, pixels; None: that of the weights.
        tell: as in ``ModelConfig.from_vlmo``.
    Raises:
        UserError: as ``ModelConfig.from_vlmo``.
    """
    config = sized_as(ModelConfig.from_vlmo(vlmo_config, tell=tell), state)
    if image_size is not None:
        config = replace(config, image_size=image_size)
    config.check()
    return config


def sized_as(config: ModelConfig, state: Mapping[str, Tensor]) -> ModelConfig:
    """Set the image size and the number of text positions of a config to those of the tensors.

    Args:
        config: all other values.
        state: published or EVE-DS names; without positions, the config is returned unchanged.
    """
    image, text = (
        next((state[name].shape for name in names if name in state and state[name].ndim == 2), None)
        for names in (IMAGE_POSITIONS, TEXT_POSITIONS)
    )
    if image is not None and image[0] > 1:
        config = replace(config, image_size=math.isqrt(image[0] - 1) * config.patch_size)
    if text is not None:
        config = replace(config, text_positions=text[0], max_text_length=min(config.max_text_length, text[0]))
    return config
