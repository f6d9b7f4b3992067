"""Every module runs on ``device="meta"``, forward and backward: a tensor made on another device would be refused.

The modules are made on the meta device but called outside of its context, so that a tensor which a forward makes
without naming a device lands on the CPU and does not mix with the rest.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor, nn

import eve_ds.model
import eve_ds.tasks
from eve_ds.kernels.permute import Layout
from eve_ds.model.backbone import Backbone
from eve_ds.model.block import MLP, QKV, Attention, Block, DenseBlock, HardBlock, SharedBlock, SoftBlock, key_bias
from eve_ds.model.decoders import DecoderBlock, PixelDecoder, WordDecoder, WordMLP
from eve_ds.model.embeddings import ImageEmbedding, PatchProjection, TextEmbedding
from eve_ds.model.experts import Experts
from eve_ds.model.moe import MoE
from eve_ds.model.router import Router
from eve_ds.tasks import Task
from eve_ds.tasks.contrast import Contrast
from eve_ds.tasks.itc_itm import ItcItm
from eve_ds.tasks.itc_itm_mlm import ItcItmMlm
from eve_ds.tasks.itc_itm_mlm_mim import ItcItmMlmMim
from eve_ds.tasks.itc_mlm_mim import ItcMlmMim
from eve_ds.tasks.masked_modeling import MaskedModeling
from eve_ds.tasks.mlm_mim_codes import MaskedCodes
from eve_ds.tasks.nlvr import NLVR, AttentionPool, CrossAttention
from eve_ds.tasks.retrieval import Retrieval
from eve_ds.tasks.rivals import Rival
from eve_ds.tasks.vqa import VQA
from tests.support.tiny_tasks import JOINT, MASK, NUM_ANSWERS, OBJECTIVE, TASKS, tiny_batch, tiny_config

BASES = {Block, DenseBlock, Task, Contrast, Rival}  # others are what runs
D, H, E, IMAGE_TOKENS = 32, 64, 4, 17  # as in tiny_config
CONFIG = replace(tiny_config(), drop_path=0.5)

Built = tuple[nn.Module, tuple[Any, ...]]
Case = Callable[[], Built]


def floats(*shape: int) -> Tensor:
    return torch.zeros(shape, requires_grad=True)


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def mask(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def moe(**changes: Any) -> Built:
    return MoE(**{"dim": D, "hidden": H, "num_experts": E, **changes}), (floats(2, 5, D), ids(5), mask(2, 5))


def backbone(images: bool = True, texts: bool = True, keep: bool = False, **changes: Any) -> Built:
    text = (ids(2, 6), mask(2, 6)) if texts else (None, None)
    patch_keep = ids(2, 3) if keep else None
    return Backbone(replace(CONFIG, **changes)), (torch.zeros(2, 3, 32, 32) if images else None, *text, patch_keep)


def soft_block(valid: bool) -> Built:
    block = SoftBlock(CONFIG, MoE(D, H, E))
    some = mask(2, 5) if valid else None
    return block, (floats(2, 5, D), None if some is None else key_bias(some, torch.float32), ids(5), some)


def hard_block(num_image_tokens: int, kind: type[Block] = HardBlock) -> Built:
    return kind(CONFIG), (floats(2, 5, D), key_bias(mask(2, 5), torch.float32), num_image_tokens)


def task(build: Callable[[Backbone], Task], **columns: Tensor) -> Built:
    batch = {name: torch.zeros_like(value) for name, value in tiny_batch(4).items()}
    batch |= {"text_mask": torch.ones_like(batch["text_mask"]), **columns}
    return build(Backbone(CONFIG)), (batch,)


CASES: dict[type[nn.Module], dict[str, Case]] = {
    QKV: {"": lambda: (QKV(D), (floats(2, 5, D),))},
    Attention: {
        "unmasked": lambda: (Attention(D, 4), (floats(2, 5, D), None)),
        "masked": lambda: (Attention(D, 4), (floats(2, 5, D), key_bias(mask(2, 5), torch.float32))),
    },
    MLP: {
        "gelu": lambda: (MLP(D, H, "gelu"), (floats(2, 5, D),)),
        "quick_gelu": lambda: (MLP(D, H, "quick_gelu"), (floats(2, 5, D),)),
    },
    PatchProjection: {"": lambda: (PatchProjection(3, D, 8, stride=8), (floats(2, 4, 192),))},
    ImageEmbedding: {
        "whole": lambda: (ImageEmbedding(D, 8, 16), (floats(2, 3, 32, 32),)),
        "some patches": lambda: (ImageEmbedding(D, 8, 16), (floats(2, 3, 32, 32), ids(2, 3))),
    },
    TextEmbedding: {"": lambda: (TextEmbedding(D, 50, 16, 1e-6), (ids(2, 6),))},
    HardBlock: {
        "pairs": lambda: hard_block(3),
        "images": lambda: hard_block(5),
        "texts": lambda: hard_block(0),
    },
    SharedBlock: {"": lambda: hard_block(3, SharedBlock)},
    SoftBlock: {"unpadded": lambda: soft_block(False), "padded": lambda: soft_block(True)},
    Experts: {
        "": lambda: (
            Experts(D, H, E, "gelu", seed=0),
            (floats(12, D), None, Layout(ids(12), ids(12), [3] * 4, [3] * 4)),
        )
    },
    Router: {f"top {k}": lambda k=k: (Router(D, E, k), (floats(7, D),)) for k in (1, 2)},
    MoE: {
        "no token dropped": lambda: moe(),
        "capacity": lambda: moe(capacity_factor=1.0),
        "published routing": lambda: moe(capacity_factor=1.0, published_routing=True),
        "top 1": lambda: moe(top_k=1),
        "router alone sees the modality": lambda: moe(modality_to_experts=False),
        "nobody sees the modality": lambda: moe(modality_routing=False),
        "z-loss and jitter": lambda: moe(z_loss=True, jitter=0.1),
    },
    Backbone: {
        "pairs": lambda: backbone(),
        "images": lambda: backbone(texts=False),
        "texts": lambda: backbone(images=False),
        "some patches": lambda: backbone(keep=True),
        "capacity": lambda: backbone(capacity_factor=1.0),
        "recomputed": lambda: backbone(checkpoint_activations=True),
        "no soft layers": lambda: backbone(soft_layers=[]),
        "shared layers": lambda: backbone(soft_layers=[2], shared_layers=[1]),
    },
    DecoderBlock: {"": lambda: (DecoderBlock(D, 4), (floats(2, 5, D),))},
    PixelDecoder: {"": lambda: (PixelDecoder(D, 16, 8, 16, 1, 2), (floats(2, 4, D), ids(2, 3), ids(2, 13)))},
    WordDecoder: {"": lambda: (WordDecoder(D, 50), (floats(7, D), floats(50, D)))},
    WordMLP: {"": lambda: (WordMLP(D, 50), (floats(7, D),))},
    CrossAttention: {"": lambda: (CrossAttention(D, 4, 0.1), (floats(2, 5, D), floats(2, 5, D), mask(2, 5)))},
    AttentionPool: {"": lambda: (AttentionPool(D, 0.1), (floats(2, 5, D), mask(2, 5)))},
    MaskedModeling: {
        "separate": lambda: task(lambda backbone: MaskedModeling(backbone, OBJECTIVE, MASK)),
        "joint": lambda: task(lambda backbone: MaskedModeling(backbone, JOINT, MASK)),
        "masked otherwise": lambda: task(TASKS["pretrain_masked_otherwise"]),
    },
    MaskedCodes: {"": lambda: task(TASKS["pretrain_codes"])},
    ItcItm: {"": lambda: task(TASKS["itc_itm"])},
    ItcItmMlm: {"": lambda: task(TASKS["itc_itm_mlm"])},
    ItcItmMlmMim: {"": lambda: task(TASKS["itc_itm_mlm_mim"])},
    ItcMlmMim: {"": lambda: task(TASKS["itc_mlm_mim"])},
    Retrieval: {"": lambda: task(lambda backbone: Retrieval(backbone, embed_dim=16))},
    VQA: {
        "": lambda: task(lambda backbone: VQA(backbone, NUM_ANSWERS)),
        "repeated rows": lambda: task(lambda backbone: VQA(backbone, NUM_ANSWERS), valid=mask(4)),
    },
    NLVR: {
        "plain": lambda: task(lambda backbone: NLVR(backbone)),
        "biattn": lambda: task(lambda backbone: NLVR(backbone, biattn=True)),
    },
}


def modules_of(*packages: Any) -> Iterator[type[nn.Module]]:
    """All nn.Module classes that the packages' files define."""
    for package in packages:
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            for value in vars(importlib.import_module(info.name)).values():
                if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == info.name:
                    yield value


def tensors(value: Any) -> list[Tensor]:
    """All tensors in an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def run(case: Case, device: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Forward and backward in training mode. Returns the output's tensors, and the gradients of weights and inputs."""
    with torch.device(device):
        module, inputs = case()
    # How many words are masked is data, which the meta device has none of: there, all count.
    with fx_config.patch(meta_nonzero_assume_all_nonzero=True):
        outputs = tensors(module.train()(*inputs))
        sum(output.sum() for output in outputs if output.requires_grad).backward()
    leaves = {**dict(module.named_parameters()), **{f"input {i}": x for i, x in enumerate(inputs)}}
    gradients = {name: leaf.grad for name, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.grad is not None}
    return outputs, gradients


def test_no_module_is_without_a_case() -> None:
    assert set(modules_of(eve_ds.model, eve_ds.tasks)) - BASES == set(CASES)
    assert all(any(issubclass(module, base) for module in CASES) for base in BASES)


@pytest.mark.parametrize(
    ("module", "name"),
    [pytest.param(m, name, id=f"{m.__name__}-{name}") for m, cases in CASES.items() for name in cases],
)
def test_forward_and_backward_on_the_meta_device(module: type[nn.Module], name: str) -> None:
    case = CASES[module][name]
    outputs, gradients = run(case, "meta")
    assert outputs and gradients
    assert all(tensor.is_meta for tensor in [*outputs, *gradients.values()])
    real_outputs, real_gradients = run(case, "cpu")
    assert [(x.shape, x.dtype) for x in outputs] == [(x.shape, x.dtype) for x in real_outputs]
    assert {key: (x.shape, x.dtype) for key, x in gradients.items()} == {
        key: (x.shape, x.dtype) for key, x in real_gradients.items()
    }


def test_a_tensor_on_the_wrong_device_is_caught() -> None:
    class Careless(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.ones(x.shape[0], 1)

    with pytest.raises(RuntimeError, match="device"):
        run(lambda: (Careless(D, D), (floats(2, D),)), "meta")
