"""First weights from BEiT v2: the blocks compute what BEiT's compute, and every tensor is accounted for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eve_ds.model.backbone import Backbone
from eve_ds.model.block import HardBlock, SharedBlock, SoftBlock
from eve_ds.model.model_config import ModelConfig
from eve_ds.model.moe import IMAGE, TEXT
from eve_ds.weights.beit import Origins, fill_from_beit
from eve_ds.weights.load import interpolate_positions
from preprocessing.errors import UserError

DIM, HIDDEN, HEADS, DEPTH, PATCH, PATCHES = 24, 40, 3, 3, 4, 9
CONFIG = ModelConfig(
    image_size=12,
    patch_size=PATCH,
    dim=DIM,
    depth=DEPTH,
    num_heads=HEADS,
    mlp_hidden=HIDDEN,
    vocab_size=20,
    max_text_length=8,
    text_positions=8,
    soft_layers=[2],
    num_experts=4,
    modality_to_experts=False,
    activation="gelu",
    drop_path=0.0,
)
BLOCK_SHAPES = {
    "norm1.weight": (DIM,),
    "norm1.bias": (DIM,),
    "attn.q_bias": (DIM,),
    "attn.v_bias": (DIM,),
    "attn.qkv.weight": (3 * DIM, DIM),
    "attn.proj.weight": (DIM, DIM),
    "attn.proj.bias": (DIM,),
    "norm2.weight": (DIM,),
    "norm2.bias": (DIM,),
    "mlp.fc1.weight": (HIDDEN, DIM),
    "mlp.fc1.bias": (HIDDEN,),
    "mlp.fc2.weight": (DIM, HIDDEN),
    "mlp.fc2.bias": (DIM,),
    "gamma_1": (DIM,),
    "gamma_2": (DIM,),
}
LEFT = {
    "mask_token": (1, 1, DIM),
    "rel_pos_bias.relative_position_bias_table": (28, HEADS),
    "rel_pos_bias.relative_position_index": (10, 10),
    "lm_head.weight": (30, DIM),
    "cls_pt_layers.0.norm1.weight": (DIM,),
    "blocks.1.attn.relative_position_index": (10, 10),
    "teacher.weight": (2, 2),
}


def beit(**more: tuple[int, ...]) -> dict[str, Tensor]:
    """Random weights with the names and shapes of unilm's VisionTransformerForMaskedImageModelingCLS."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, DIM),
        "pos_embed": (1, 1 + PATCHES, DIM),
        "patch_embed.proj.weight": (DIM, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (DIM,),
        "norm.weight": (DIM,),
        "norm.bias": (DIM,),
    }
    for index in range(DEPTH):
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in BLOCK_SHAPES.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) / 4 for name, shape in (shapes | more).items()}


def beit_block(x: Tensor, state: dict[str, Tensor], index: int) -> Tensor:
    """``Block.forward`` and ``Attention.forward`` of unilm's beit2/modeling_finetune.py, without relative positions."""
    own = {name: state[f"blocks.{index}.{name}"] for name in BLOCK_SHAPES}
    y = F.layer_norm(x, (DIM,), own["norm1.weight"], own["norm1.bias"], eps=1e-6)
    bias = torch.cat([own["attn.q_bias"], torch.zeros(DIM), own["attn.v_bias"]])
    qkv = F.linear(y, own["attn.qkv.weight"], bias).reshape(*x.shape[:2], 3, HEADS, DIM // HEADS)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(DIM // HEADS)).softmax(dim=-1)
    y = (weights @ v).transpose(1, 2).reshape(x.shape)
    x = x + own["gamma_1"] * F.linear(y, own["attn.proj.weight"], own["attn.proj.bias"])
    y = F.layer_norm(x, (DIM,), own["norm2.weight"], own["norm2.bias"], eps=1e-6)
    y = F.gelu(F.linear(y, own["mlp.fc1.weight"], own["mlp.fc1.bias"]))
    return x + own["gamma_2"] * F.linear(y, own["mlp.fc2.weight"], own["mlp.fc2.bias"])


def filled(state: dict[str, Tensor], config: ModelConfig = CONFIG) -> tuple[Backbone, Origins]:
    torch.manual_seed(3)
    backbone = Backbone(config)
    return backbone, fill_from_beit(backbone, state)


@pytest.mark.parametrize(("num_image_tokens", "shared"), [(10, []), (0, []), (6, []), (6, [1])])
def test_every_block_computes_what_beit_computes_for_images_and_texts(num_image_tokens: int, shared: list[int]) -> None:
    state = beit()
    backbone, _ = filled(state, replace(CONFIG, shared_layers=shared))
    x = torch.randn(2, 10, DIM, generator=torch.Generator().manual_seed(1))
    modality = torch.full((10,), TEXT)
    modality[:num_image_tokens] = IMAGE
    for index, block in enumerate(backbone.blocks):
        if isinstance(block, HardBlock | SharedBlock):
            out = block(x, None, num_image_tokens)
        else:
            assert isinstance(block, SoftBlock)
            out = block(x, None, modality, None)[0]
        assert torch.allclose(out, beit_block(x, state, index), atol=1e-5), index


def test_images_are_embedded_as_beit_does() -> None:
    state = beit()
    backbone, _ = filled(state)
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    patches = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    tokens = torch.cat([state["cls_token"].expand(2, -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    found = backbone.image_embedding(images) - backbone.image_embedding.type_vector
    assert torch.allclose(found, tokens + state["pos_embed"], atol=1e-5)
    assert torch.equal(backbone.norm.weight, state["norm.weight"])


def test_positions_are_interpolated_to_the_models_images() -> None:
    state = beit(pos_embed=(1, 1 + 16, DIM))
    backbone, _ = filled(state)
    assert torch.equal(backbone.image_embedding.positions, interpolate_positions(state["pos_embed"][0], PATCHES))


def test_all_tensors_of_both_sides_are_listed() -> None:
    state = beit(**LEFT)
    backbone, origins = filled(state)
    assert origins.left.keys() == LEFT.keys()
    assert origins.taken.keys() == state.keys() - LEFT.keys()
    taken = {name for names in origins.taken.values() for name in names}
    assert taken | origins.new.keys() == dict(backbone.named_parameters()).keys()
    assert not taken & origins.new.keys()
    assert {"text_embedding.words.weight", "embedding_norm.weight", "blocks.2.moe.router.weight"} <= origins.new.keys()
    assert origins.taken["blocks.0.mlp.fc1.weight"] == [f"blocks.0.{m}_mlp.fc1.weight" for m in ("image", "text")]
    lines = "\n".join(origins.lines())
    assert all(f"  {name}" in lines for name in (*state, *origins.new))
    assert "relative positions" in origins.left["rel_pos_bias.relative_position_bias_table"]
    assert origins.left["teacher.weight"] == "not a name of BEiT v2"


def test_new_parameters_keep_their_initial_values() -> None:
    backbone, origins = filled(beit())
    torch.manual_seed(3)
    fresh = dict(Backbone(CONFIG).named_parameters())
    for name, value in backbone.named_parameters():
        assert torch.equal(value, fresh[name]) == (name in origins.new), name


def test_options_of_the_file_may_be_absent() -> None:
    """Relative positions alone (as in unilm's files), no LayerScale, a classifier's norm: all are unilm's options."""
    state = beit(**{"fc_norm.weight": (DIM,), "head.weight": (10, DIM)})
    absent = ("pos_embed", "norm.weight", "norm.bias", "attn.q_bias", "attn.v_bias", "gamma_1", "gamma_2")
    state = {name: value for name, value in state.items() if not name.endswith(absent) or name == "fc_norm.weight"}
    backbone, origins = filled(state)
    assert {"image_embedding.positions", "norm.weight", "blocks.2.attention.qkv.q_bias"} <= origins.new.keys()
    assert (backbone.blocks[1].attention_scale == 1).all() and (backbone.blocks[2].mlp_scale == 1).all()
    assert "LayerScale" in origins.new["blocks.1.attention_scale"]
    assert origins.left.keys() == {"fc_norm.weight", "head.weight"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rel_pos_bias.relative_position_bias_table": (28, 4)}, "is for 4 attention heads, model.num_heads=3"),
        ({"blocks.3.norm1.weight": (DIM,)}, "it has 4 blocks, model.depth=3"),
        ({"blocks.2.mlp.fc1.weight": (HIDDEN + 1, DIM)}, r"fc1\.weight is \[41, 24\], the model has \[40, 24\]"),
        ({"blocks.2.mlp.fc1.bias": (4, HIDDEN)}, r"fc1\.bias is \[4, 40\], the model has \[40\]"),
        ({"pos_embed": (1, 1 + 8, DIM)}, "not square grids"),
        ({"pos_embed": (2, 1 + 9, DIM)}, r"pos_embed is \[2, 10, 24\]"),
        ({"cls_token": (DIM,)}, r"cls_token is \[24\]"),
    ],
)
def test_another_size_is_named(change: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        filled(beit(**change))


def test_another_model_is_named() -> None:
    state = {name: value for name, value in beit().items() if name != "blocks.1.attn.qkv.weight"}
    with pytest.raises(UserError, match=r"not a BEiT v2 model .* missing: blocks\.1\.attn\.qkv\.weight$"):
        filled(state)
