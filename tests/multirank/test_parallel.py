"""Collectives and the expert-parallel layer on real ranks (gloo) against one process that holds the whole batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from eve_ds import parallel
from eve_ds.model.backbone import Backbone
from eve_ds.model.model_config import ModelConfig
from eve_ds.model.moe import MoE
from tests.support.distributed import RankFailedError, run_distributed_test

SAMPLES = {2: [3, 4], 4: [1, 0, 4, 2]}  # per rank: uneven, also none
DIM, TOKENS, EXPERTS = 8, 5, 8


def check_all_to_all() -> None:
    rank, size = parallel.rank(), parallel.world_size()
    send = [(rank + other) % 3 for other in range(size)]  # also nothing at all
    receive = parallel.exchange_counts(torch.tensor(send).view(size, 1)).flatten().tolist()
    assert receive == [(other + rank) % 3 for other in range(size)]
    for dtype in (torch.float32, torch.bfloat16):
        labels = [[rank, other] for other in range(size) for _ in range(send[other])]
        rows = torch.tensor(labels, dtype=dtype).view(-1, 2).requires_grad_()
        out = parallel.all_to_all_uneven(rows, send, receive)
        expected = [[other, rank] for other in range(size) for _ in range(receive[other])]
        torch.testing.assert_close(out.detach(), torch.tensor(expected, dtype=dtype).view(-1, 2))
        (out * (rank + 1)).sum().backward()  # a row's gradient tells where it went
        where = torch.tensor(labels, dtype=dtype).view(-1, 2)[:, 1:] + 1
        torch.testing.assert_close(rows.grad, where.expand(-1, 2))
    with pytest.raises(ValueError, match="all_to_all_uneven"):
        parallel.all_to_all_uneven(rows, [99] * size, receive)


def check_gather() -> None:
    rank, size = parallel.rank(), parallel.world_size()
    counts = [2, 0, 3, 1][:size]
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.full((counts[rank], 2, 3), float(rank), dtype=dtype, requires_grad=True)
        out = parallel.gather_with_gradient(rows)
        expected = torch.cat([torch.full((count, 2, 3), float(other)) for other, count in enumerate(counts)])
        torch.testing.assert_close(out.detach().float(), expected)
        (out * (rank + 1)).sum().backward()
        torch.testing.assert_close(rows.grad.float(), torch.full(rows.shape, size * (size + 1) / 2))
    ids = parallel.gather_with_gradient(torch.full((counts[rank],), rank))
    assert ids.tolist() == [other for other, count in enumerate(counts) for _ in range(count)]
    assert parallel.all_reduce_sum(torch.tensor([rank, 1])).tolist() == [size * (size - 1) // 2, size]


def make_moe(ep_size: int, ep_rank: int, starve: bool) -> MoE:
    """The same layer at any size; ``starve``: all of the last rank's experts get no token."""
    torch.manual_seed(0)
    moe = MoE(DIM, 12, EXPERTS, 2, seed=7, ep_size=ep_size, ep_rank=ep_rank, z_loss=True)
    with torch.no_grad():
        moe.router.weight.normal_()
        moe.experts.w3.fill_(0.1)
        if starve:
            moe.router.weight[-EXPERTS // 2 :] = -5.0  # and the tokens are positive
    return moe


def moe_batch(size: int, case: str) -> dict[str, Tensor]:
    """The whole batch; a rank takes its samples."""
    generator = torch.Generator().manual_seed(1)
    samples = sum(SAMPLES[size])
    valid = torch.rand(samples, TOKENS, generator=generator) < 0.7
    if case == "no tokens":
        valid[:] = False
    if case == "one rank without tokens":
        valid[: SAMPLES[size][0]] = False
    x = torch.randn(samples, TOKENS, DIM, generator=generator)
    weight = torch.randn(samples, TOKENS, DIM, generator=generator)
    return {"x": x.abs() if case == "starved experts" else x, "weight": weight, "valid": valid}


def moe_step(moe: MoE, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    x = batch["x"].clone().requires_grad_()
    y, aux = moe(x, torch.tensor([0, 0, 0, 1, 1]), batch["valid"])
    ((y * batch["weight"]).sum() + 3 * aux.sum()).backward()
    grads = {name: parameter.grad for name, parameter in moe.named_parameters()}
    return {"y": y.detach(), "aux": aux.detach(), "load": moe.last_load, "x.grad": x.grad, **grads}


CASES = ["plain", "starved experts", "one rank without tokens", "no tokens"]


def check_moe(folder: str, ep_size: int) -> None:
    rank, size = parallel.rank(), parallel.world_size()
    groups = [dist.new_group(list(range(start, start + ep_size))) for start in range(0, size, ep_size)]
    start = sum(SAMPLES[size][:rank])
    mine = slice(start, start + SAMPLES[size][rank])
    for case in CASES:
        moe = make_moe(ep_size, rank % ep_size, case == "starved experts")
        moe.ep_group = groups[rank // ep_size]
        whole = load_file(Path(folder, f"{case}.safetensors"))
        got = moe_step(moe, {name: tensor[mine] for name, tensor in moe_batch(size, case).items()})
        close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5, msg=lambda text: f"{case}: {text}")  # noqa: B023
        close(got["y"], whole["y"][mine])
        close(got["x.grad"], whole["x.grad"][mine])
        for name in ("aux", "load", "router.weight", "image_vector", "text_vector"):
            close(parallel.all_reduce_sum(got[name]), whole[name])
        for name in ("experts.w1", "experts.w2", "experts.w3"):
            full = torch.zeros_like(whole[name])  # sum over the groups that hold a copy of the expert
            full.chunk(ep_size)[rank % ep_size].copy_(got[name])
            close(parallel.all_reduce_sum(full), whole[name])


def backbone_step(backbone: Backbone, rows: slice, aux_weight: float = 0.5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(7, 3, 16, 16, generator=generator)[rows]
    ids = torch.randint(5, 20, (7, 6), generator=generator)[rows]
    mask = (torch.arange(6) < torch.randint(1, 7, (7, 1), generator=generator))[rows]
    out = backbone(images, ids, mask, draws=torch.rand(12, 7, generator=generator)[:, rows])  # for the jitter
    hidden = torch.where(torch.cat([mask.new_ones(len(ids), 5), mask], 1)[..., None], out.hidden, 0)
    loss = hidden.pow(3).mean(dim=-1).sum() / 50 + aux_weight * (out.aux_loss + out.router_z_loss)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in backbone.named_parameters()}
    return {"hidden": hidden.detach(), "loss": loss.detach(), **grads}


def make_backbone(checkpointed: bool, **moe: int) -> Backbone:
    config = ModelConfig(
        image_size=16, patch_size=8, dim=16, depth=4, num_heads=2, mlp_hidden=24, vocab_size=20, max_text_length=8,
        text_positions=8, soft_layers=[2, 3], num_experts=EXPERTS, drop_path=0.0, checkpoint_activations=checkpointed,
        shared_layers=[1], modality_routing=False, router_jitter=0.1, router_z_loss_weight=1.0,
    )  # fmt: skip
    torch.manual_seed(5)
    return Backbone(config, partial(MoE, **moe))


def check_backbone(folder: str, ep_size: int) -> None:
    rank, size = parallel.rank(), parallel.world_size()
    groups = [dist.new_group(list(range(start, start + ep_size))) for start in range(0, size, ep_size)]
    start = sum(SAMPLES[size][:rank])
    mine = slice(start, start + SAMPLES[size][rank])
    whole = load_file(Path(folder, "backbone.safetensors"))
    for checkpointed in (False, True):
        backbone = make_backbone(checkpointed, ep_size=ep_size, ep_rank=rank % ep_size)
        for layer in backbone.moe_layers():
            layer.ep_group = groups[rank // ep_size]
        got = backbone_step(backbone, mine)
        torch.testing.assert_close(got.pop("hidden"), whole["hidden"][mine], atol=1e-5, rtol=1e-5)
        for name, tensor in got.items():
            if ".experts." in name:
                full = torch.zeros_like(whole[name])
                full.chunk(ep_size)[rank % ep_size].copy_(tensor)
                tensor = full
            torch.testing.assert_close(parallel.all_reduce_sum(tensor), whole[name], atol=1e-5, rtol=1e-5)


def check_everything(folder: str) -> None:
    check_all_to_all()
    check_gather()
    for ep_size in {1, 2, dist.get_world_size()}:
        check_moe(folder, ep_size)
        check_backbone(folder, ep_size)


@pytest.mark.parametrize("world_size", [2, 4])
def test_parallel_equals_single(world_size: int, tmp_path: Path) -> None:
    for case in CASES:
        single = moe_step(make_moe(1, 0, case == "starved experts"), moe_batch(world_size, case))
        save_file(single, tmp_path / f"{case}.safetensors")
        if case == "starved experts":
            assert not single["load"][:, -EXPERTS // 2 :].any()
    save_file(backbone_step(make_backbone(False), slice(0, 7)), tmp_path / "backbone.safetensors")
    run_distributed_test(check_everything, world_size, args=(str(tmp_path),))


def fail_on_rank_one() -> None:
    if parallel.rank() == 1:
        raise ValueError("rank one's own trouble")
    dist.barrier()


def wait_for_ever() -> None:
    if parallel.rank() == 0:
        dist.recv(torch.zeros(1), src=1)
    else:
        torch.multiprocessing.Event().wait()


def test_a_failing_rank_is_reported_and_the_others_are_killed() -> None:
    with pytest.raises(RankFailedError, match="rank one's own trouble"):
        run_distributed_test(fail_on_rank_one, 2)


def test_a_hang_ends() -> None:
    with pytest.raises(TimeoutError, match="did not end in time"):
        run_distributed_test(wait_for_ever, 2, timeout=6)
