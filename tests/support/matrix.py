"""Training under DeepSpeed, case by case, beside one plain PyTorch process on the same global batches.

The two are comparable with AdamW at eps 1e-4 (else gradients near zero change signs) and without dropout.
What makes it hard: the auxiliary loss is on; texts differ in length by row, so that the ranks hold different numbers of
tokens; in one layer half of the experts, so whole ranks of them, get no token, and in the other one expert.
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from eve_ds.config_sections import EngineConfig, OptimizerConfig
from eve_ds.model.moe import MoE
from eve_ds.tasks.masked_modeling import MaskedModeling
from tests.support.averages import EMA_DECAY, evaluate, moving
from tests.support.fp16 import allow_fp16
from tests.support.pairwise import every_case, pairwise
from tests.support.strays import BF16_TENSOR_TOLERANCE, BF16_TOLERANCE, FP32_TOLERANCE, strays
from tests.support.tiny import caption_batch, expert_parallel, masked_task, mixed, rows_of

STEPS, ROWS, EXPERTS, CLIP = 3, 32, 8, 0.5
# Per softly routing layer: experts that never win; and in bf16 the two of every image token and the two of every text
# token: a token near a tie goes either way by rounding there, and one more token for an expert that has few tells.
IDLE = ((4, 5, 6, 7), (7,))
DECIDED = (((0, 1), (2, 3)), ((0, 4), (2, 6)))
HALVES, FP16_SCALE = {"bf16": torch.bfloat16, "fp16": torch.float16}, 1024.0

FACTORS: dict[str, list[Any]] = {
    "stage": [1, 2, 3],
    "ep_size": [1, 2, 4],
    "world_size": [2, 4],
    "precision": ["fp32", "bf16"],
    "clipping": [False, True],
    "accumulation": [1, 2],
    "checkpointing": [False, True],
}


Reference = tuple[str, bool, int, tuple[str, ...], str]


@dataclass(frozen=True)
class Case:
    """A setting of the engine.

    ``zero`` changes entries of the DeepSpeed file's zero_optimization, ``file`` those of its top level.
    """

    stage: int
    ep_size: int
    world_size: int
    precision: str = "fp32"
    clipping: bool = True
    accumulation: int = 1
    checkpointing: bool = False
    freeze: tuple[str, ...] = ()
    kinds: str = ""  # of ``tiny.mixed``: modalities of the rows; none: pairs alone
    zero: tuple[tuple[str, Any], ...] = ()
    file: tuple[tuple[str, Any], ...] = ()

    @property
    def refused_optimizer(self) -> bool:
        """Whether DeepSpeed trains with none of its ZeRO 1 to 3, which our averages and norms by kind are made for."""
        data_types = dict(self.file).get("data_types", {})
        return ("stage", 0) in self.zero or (self.stage == 1 and data_types.get("grad_accum_dtype") == "fp32")

    @property
    def reference(self) -> Reference:
        """What one process has to know of the case: neither ranks nor recomputation change what is learned."""
        return self.precision, self.clipping, self.accumulation, self.freeze, self.kinds

    def __str__(self) -> str:
        extras = [name for name in ("clipping", "checkpointing") if getattr(self, name)]
        extras += [f"{name}={value}" for name, value in self.zero + self.file]
        extras += [f"{pattern} frozen" for pattern in self.freeze]
        extras += [f"rows {self.kinds}"] if self.kinds else []
        return ", ".join(
            [
                f"ZeRO {self.stage}, EP {self.ep_size}, world {self.world_size}, {self.precision}",
                f"accumulation {self.accumulation}",
                *extras,
            ]
        )


@dataclass
class Trajectory:
    """Loss and gradient norm (before clipping; also by kind) of each step, and of a held-out batch the losses with the
    last weights and with the averages; weights before and after, and their moving averages, by name, fp32."""

    losses: list[float]
    norms: list[float]
    first: dict[str, np.ndarray]
    last: dict[str, np.ndarray]
    kinds: list[dict[str, float]] = field(default_factory=list)
    averages: dict[str, np.ndarray] = field(default_factory=dict)


def accepted(case: dict[str, Any]) -> bool:
    """Expert-parallel groups lie within the world; all else goes with all else."""
    return bool(case["ep_size"] <= case["world_size"])


def all_cases() -> list[Case]:
    return [Case(**values) for values in every_case(FACTORS, accepted)]


def pairwise_cases() -> list[Case]:
    return [Case(**values) for values in pairwise(FACTORS, accepted)]


def optimizer_config(clipping: bool, freeze: tuple[str, ...] = ()) -> OptimizerConfig:
    clip = CLIP if clipping else 0.0
    return OptimizerConfig(
        lr=1e-2, eps=1e-4, weight_decay=0.1, gradient_clipping=clip, total_steps=STEPS, freeze=list(freeze)
    )


def build(precision: str, moe_layer: Any = MoE, checkpointing: bool = False) -> MaskedModeling:
    """The task, its routers such that the idle experts' scores lie 30 and more below the others'.

    First weights and LayerScale are larger than usual: every tensor moves by 1e-3 and more, so 1e-5 says something.
    """
    changes = {"num_experts": EXPERTS, "init_std": 0.1, "layer_scale": 0.5, "checkpoint_activations": checkpointing}
    task = masked_task(moe_layer, **changes)
    with torch.no_grad():
        for layer, idle, (image, text) in zip(task.backbone.moe_layers(), IDLE, DECIDED, strict=True):
            weight = layer.router.weight.mul_(10)  # choices differ from token to token
            weight[:, :2] = 0.0
            weight[list(idle), 0] = -6.0
            if precision != "fp32":
                weight[list(image), 1], weight[list(text), 1] = 6.0, -6.0
            layer.image_vector[:2] = torch.tensor([5.0, 5.0])
            layer.text_vector[:2] = torch.tensor([5.0, -5.0])
    return task


def micro_batch(number: int, kinds: str) -> dict[str, Tensor]:
    """Of all ranks."""
    batch = caption_batch(ROWS, seed=number)
    return mixed(batch, kinds) if kinds else batch


def check_idle(task: MaskedModeling, load: list[Tensor]) -> None:
    """Over all ranks (``load`` [2, E] a layer) the idle experts had no token, and several others had some."""
    for layer, (idle, total) in enumerate(zip(IDLE, load, strict=True)):
        served = total.sum(dim=0)
        assert not served[list(idle)].any(), f"layer {layer}: {served.tolist()}"
        assert served.count_nonzero() > task.config.top_k, f"layer {layer}: {served.tolist()}"


def loads(task: MaskedModeling) -> list[Tensor]:
    return [layer.last_load for layer in task.backbone.moe_layers()]


def arrays(task: MaskedModeling) -> dict[str, np.ndarray]:
    return {name: value.detach().float().numpy().copy() for name, value in task.named_parameters()}


def held_out_batch() -> dict[str, Tensor]:
    return caption_batch(ROWS, seed=99)


@torch.no_grad()
def held_out_loss(task: MaskedModeling, values: dict[str, torch.nn.Parameter]) -> float:
    """With these weights, which ``task`` keeps."""
    for name, parameter in task.named_parameters():
        parameter.copy_(values[name])
    return float(task.eval()(held_out_batch()).loss)


def norms_of(masters: dict[str, torch.nn.Parameter]) -> dict[str, float]:
    """Of the gradients, by kind of parameter."""
    from eve_ds.callbacks.grad_norms import kind_of

    squares: dict[str, float] = {}
    for name, master in masters.items():
        square = 0.0 if master.grad is None else float(master.grad.double().square().sum())
        squares[kind_of(name)] = squares.get(kind_of(name), 0.0) + square
    return {kind: math.sqrt(square) for kind, square in squares.items()}


def one_process(
    precision: str, clipping: bool, accumulation: int, freeze: tuple[str, ...] = (), kinds: str = ""
) -> Trajectory:
    """A plain loop. In bf16 and fp16 AdamW and the norm see an fp32 copy alone; in fp16 the loss is scaled."""
    from eve_ds.engine.optim import decayed

    options, task = optimizer_config(clipping), build(precision)
    if precision != "fp32":
        task.to(HALVES[precision])
    scale = FP16_SCALE if precision == "fp16" else 1.0
    masters = {name: torch.nn.Parameter(value.detach().float()) for name, value in task.named_parameters()}
    for name, value in task.named_parameters():
        frozen = any(fnmatch.fnmatch(name, pattern) for pattern in freeze)
        value.requires_grad_(not frozen)
        masters[name].requires_grad_(not frozen)
    decays = decayed(task)
    optimizer = torch.optim.AdamW(
        [
            {"params": [value for name, value in masters.items() if name in decays]},
            {"params": [value for name, value in masters.items() if name not in decays], "weight_decay": 0.0},
        ],
        lr=options.lr,
        betas=tuple(options.betas),
        eps=options.eps,
        weight_decay=options.weight_decay,
    )
    trajectory = Trajectory([], [], arrays(task), {})
    weights = torch.nn.ParameterList(masters.values())
    averaged = AveragedModel(weights, avg_fn=moving)
    averaged.update_parameters(weights)
    for step in range(STEPS):
        loss = 0.0
        for micro in range(accumulation):
            output = task(micro_batch(step * accumulation + micro, kinds))
            check_idle(task, loads(task))
            (output.loss * (scale / accumulation)).backward()
            loss += float(output.loss.detach()) / accumulation
            for name, value in task.named_parameters():
                if not value.requires_grad:
                    continue
                assert value.grad is not None, name
                master = masters[name]
                gradient = value.grad.float() / scale
                master.grad = gradient if master.grad is None else master.grad + gradient
            task.zero_grad()
        trajectory.kinds.append(norms_of(masters))
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), CLIP if clipping else torch.inf)
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(weights)
        with torch.no_grad():
            for name, value in task.named_parameters():
                value.copy_(masters[name])
        trajectory.losses.append(loss)
        trajectory.norms.append(float(norm))
    trajectory.last = {name: value.detach().numpy().copy() for name, value in masters.items()}  # in fp32 the task's own
    averages = dict(zip(masters, averaged.module, strict=True))
    trajectory.losses += [held_out_loss(task, values) for values in (masters, averages)]
    trajectory.averages = {name: value.detach().numpy() for name, value in averages.items()}
    return trajectory


def references(cases: list[Case]) -> dict[Reference, Trajectory]:
    return {key: one_process(*key) for key in sorted({case.reference for case in cases})}


def compare(cases: list[Case], expected: dict[Reference, Trajectory]) -> None:
    """Train each case on the ranks that call this; raise AssertionError naming all cases that differ, and in what."""
    from eve_ds.engine.distributed import disable_shm_operation
    from eve_ds.environment import prepare_environment

    prepare_environment()
    import deepspeed

    disable_shm_operation()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    faults = []
    for case in cases:
        assert case.world_size == dist.get_world_size()
        trajectory = under_deepspeed(case)
        if dist.get_rank() == 0:
            faults += [f"{case}: {fault}" for fault in differences(case, trajectory, expected[case.reference])]
    assert not faults, "\n".join(faults)


def under_deepspeed(case: Case) -> Trajectory:
    """As ``one_process``, each rank with its rows of the batch; the weights are those of rank 0's ``full_state``."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    from eve_ds.callbacks.ema import EMA
    from eve_ds.callbacks.grad_norms import norms_by_kind
    from eve_ds.engine.callback import Callback
    from eve_ds.engine.deepspeed_config import load_deepspeed_config
    from eve_ds.engine.initialize import initialize
    from eve_ds.engine.moe_deepspeed import DeepSpeedMoE
    from eve_ds.engine.optim import build_optimizer

    rank, world, options = dist.get_rank(), dist.get_world_size(), optimizer_config(case.clipping, case.freeze)
    share = ROWS // world
    task = build(case.precision, expert_parallel(DeepSpeedMoE, case.ep_size, rank), case.checkpointing)
    engine_config = EngineConfig(
        global_batch_size=ROWS * case.accumulation,
        micro_batch_size=share,
        expert_parallel_size=case.ep_size,
        precision=case.precision,  # type: ignore[arg-type]
    )
    settings = load_deepspeed_config(f"ds_configs/zero{case.stage}.json", engine_config, options, world)
    settings["zero_optimization"] |= dict(case.zero)
    settings |= dict(case.file)
    by_kind = not case.refused_optimizer and "offload_optimizer" not in dict(case.zero)  # else a run has no such norms
    if case.precision == "fp16":
        allow_fp16()
        settings["fp16"] |= {"initial_scale_power": 10}  # FP16_SCALE: no step is left out
    engine = initialize(task, build_optimizer(task, options), settings)
    trajectory, trainer = Trajectory([], [], {}, {}), SimpleNamespace(engine=engine)
    if not dict(case.zero).get("contiguous_gradients", True):
        engine.optimizer.__class__ = DeepSpeedZeroOptimizer  # ours is made for settings that are not refused
    ema = Callback() if case.refused_optimizer else EMA(EMA_DECAY)
    for step in range(STEPS):
        ema.step_start(trainer)  # type: ignore[arg-type]
        loss = torch.zeros(())
        for micro in range(case.accumulation):
            batch = micro_batch(step * case.accumulation + micro, case.kinds)
            output = engine(rows_of(batch, rank * share, (rank + 1) * share))
            check_ranks(task)
            engine.backward(output.loss * world)
            if engine.is_gradient_accumulation_boundary() and by_kind:
                trajectory.kinds.append(norms_by_kind(task, engine.optimizer))
            engine.step()
            loss += output.loss.detach() / case.accumulation
        dist.all_reduce(loss)
        trajectory.losses.append(float(loss))
        trajectory.norms.append(float(engine.get_global_grad_norm() or math.nan))  # stage 0 tells none
        ema.step_end(trainer, {})  # type: ignore[arg-type]
    rows = rows_of(held_out_batch(), rank * share, (rank + 1) * share)
    trajectory.last, trajectory.averages = evaluate(trainer, ema, rows, trajectory.losses)
    engine.destroy()
    return trajectory


def check_ranks(task: MaskedModeling) -> None:
    """The case is as hard as it claims to be: experts without a token, and ranks with different numbers of them."""
    load = torch.stack(loads(task))  # [layers, 2, E]
    ranks = [torch.empty_like(load) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, load)
    check_idle(task, list(sum(ranks)))
    texts = [float(rank[:, 1].sum()) for rank in ranks]
    assert len(set(texts)) == len(texts), f"the ranks' texts have {texts} choices"


def differences(case: Case, got: Trajectory, expected: Trajectory) -> list[str]:
    """What differs beyond the tolerance.

    fp32: loss and each weight by 1e-5, gradient norm by 1e-5 of itself. bf16: loss and norm by 2e-2 of themselves; of
    the master weights of each kind (dense, experts, routers) the Euclidean distance by 2e-2 of the way that they went,
    and of each tensor by 3e-1 of it: a bf16 gradient that almost cancels has few right bits anywhere.
    """
    exact = case.precision == "fp32"
    tolerance = FP32_TOLERANCE if exact else BF16_TOLERANCE
    faults = []
    if case.refused_optimizer:  # it has no masters to average
        expected = replace(expected, losses=expected.losses[:-1], averages={})
    for step, (mine, other) in enumerate(zip(got.losses, expected.losses, strict=True)):
        if not abs(mine - other) < tolerance * (1 if exact else abs(other)):
            faults.append(f"loss of step {step} is {mine}, not {other}")
    for step, (mine, other) in enumerate(zip(got.norms, expected.norms, strict=True)):
        if not abs(mine / other - 1) < tolerance:
            faults.append(f"gradient norm of step {step} is {mine}, not {other}")
    if not (got.kinds or case.refused_optimizer or "offload_optimizer" in dict(case.zero)):
        faults.append("no step had norms by kind")
    for step, (mine, other) in enumerate(zip(got.kinds, expected.kinds[: len(got.kinds)], strict=True)):
        assert mine.keys() == other.keys()
        for kind, norm in other.items():
            if not abs(mine[kind] - norm) <= (tolerance if exact else BF16_TENSOR_TOLERANCE) * norm:
                faults.append(f"gradient norm of {kind} in step {step} is {mine[kind]}, not {norm}")
    assert got.last.keys() == expected.last.keys()
    still = [name for name in got.last if any(fnmatch.fnmatch(name, pattern) for pattern in case.freeze)]
    assert bool(still) == bool(case.freeze)
    for name in still:
        if not np.array_equal(got.last[name], expected.first[name]):
            faults.append(f"{name} was frozen and differs")
    assert got.averages.keys() == expected.averages.keys()
    faults += strays(got.last, expected.last, expected.first, exact)
    return faults + [
        f"of the averages, {fault}" for fault in strays(got.averages, expected.averages, expected.first, exact)
    ]
