"""Checkpoints into other worlds: written by one number of ranks, expert placement and ZeRO stage, read by another.

Compared are the losses of the five steps after the change with those of one plain process that never stopped, and,
bit for bit, the master weights, Adam moments and moving averages before and after the change, experts included.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.support.distributed import run_distributed_test
from tests.support.tiny import caption_batch, expert_parallel, masked_task, rows_of

ROWS, BEFORE, AFTER = 8, 2, 5
TOLERANCE = {"fp32": 1e-5, "bf16": 0.1}  # of losses near 10; those of the first weights are off by 3


class Case(NamedTuple):
    """A way to cut a checkpoint; ``groups``: the most values in a group of experts, as it limits them in big models."""

    world: int
    ep_size: int
    stage: int
    precision: str = "fp32"
    groups: int = 10**9

    @property
    def name(self) -> str:
        return f"world{self.world}_ep{self.ep_size}_zero{self.stage}_{self.precision}_{self.groups}"


class Run:
    """An engine of ours on the tiny model, with the checkpoints of its case in ``root``."""

    def __init__(self, root: Path, case: Case) -> None:
        import functools

        import torch.distributed as dist
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        from eve_ds.config_sections import EngineConfig, OptimizerConfig
        from eve_ds.engine import optim
        from eve_ds.engine.averages import Averages
        from eve_ds.engine.checkpoint_record import Topology
        from eve_ds.engine.deepspeed_config import load_deepspeed_config
        from eve_ds.engine.initialize import initialize
        from eve_ds.engine.moe_deepspeed import DeepSpeedMoE

        self.case, self.folder, self.rank = case, root / case.name, dist.get_rank()
        self.topology = Topology(case.world, case.ep_size, case.stage)
        self.task = masked_task(expert_parallel(DeepSpeedMoE, case.ep_size, self.rank))
        options = OptimizerConfig(
            lr=1e-2, eps=1e-4, weight_decay=0.1, gradient_clipping=0.5, total_steps=BEFORE + AFTER
        )
        engine_config = EngineConfig(
            global_batch_size=ROWS, expert_parallel_size=case.ep_size, precision=case.precision
        )
        settings = load_deepspeed_config(f"ds_configs/zero{case.stage}.json", engine_config, options, case.world)
        optim.split_params_into_different_moe_groups_for_optimizer = functools.partial(  # type: ignore[assignment]
            split_params_into_different_moe_groups_for_optimizer, max_group_size=case.groups
        )
        self.engine = initialize(self.task, optim.build_optimizer(self.task, options), settings)
        self.averages = Averages(self.engine)

    def train(self, steps: range) -> list[float]:
        import torch.distributed as dist

        losses, share = [], ROWS // self.case.world
        for step in steps:
            output = self.engine(rows_of(caption_batch(ROWS, seed=step), self.rank * share, (self.rank + 1) * share))
            self.engine.backward(output.loss * self.case.world)
            self.engine.step()
            self.averages.update(0.5)
            loss = output.loss.detach().double()
            dist.all_reduce(loss)
            losses.append(float(loss))
        return losses

    def save(self, step: int) -> Path:
        from eve_ds.engine import checkpoint

        files = self.averages.files()
        return checkpoint.save(self.engine, self.folder, step, self.topology, {"step": step}, rank_files=files)

    def load(self, path: Path) -> None:
        from eve_ds.engine import checkpoint, resume

        manifest = resume.check(path)
        assert manifest.step == BEFORE
        checkpoint.load(self.engine, path, manifest, self.topology, {})
        assert self.averages.load(path, manifest, self.topology)

    def close(self) -> None:
        """A process of ours has one expert-parallel size: DeepSpeed takes the largest that it ever made for its own."""
        from deepspeed.utils import groups

        self.engine.destroy()
        groups._get_expert_parallel_group_dict().clear()
        groups._get_expert_data_parallel_group_dict().clear()


def start() -> None:
    from eve_ds.engine.distributed import disable_shm_operation
    from eve_ds.environment import prepare_environment

    prepare_environment()
    import deepspeed

    disable_shm_operation()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def work(root: Path, *tasks: Case | tuple[Case, Case]) -> None:
    """Train and save for a case; load, compare and train for a change of case. One spawn, many tasks."""
    start()
    for task in tasks:
        if isinstance(task, Case):
            write(root, task)
        else:
            read(root, *task)


def write(root: Path, case: Case) -> None:
    from eve_ds.engine.whole_weights import full_state

    run = Run(root, case)
    run.train(range(BEFORE))
    run.save(BEFORE)
    state = full_state(run.task)
    if run.rank == 0:
        torch.save(state, root / f"{case.name}.state")
    run.close()


def read(root: Path, before: Case, after: Case) -> None:
    """Leaves a report: {"losses", "differing": states that are not the checkpoint's bit for bit, ...}."""
    run = Run(root / f"from_{before.name}", after)
    path = root / before.name / f"step_{BEFORE:08d}"
    if run.rank == 0:  # the rest of a conversion that was killed
        (path.parent / ".universal_step_00000002" / "zero").mkdir(parents=True)
        (path.parent / ".universal_step_00000002" / "zero" / "optimizer_state.pt").write_bytes(b"half")
    own = [group["weight_decay"] for group in run.engine.optimizer.param_groups]
    run.load(path)
    again = run.save(BEFORE)
    optimizer = run.engine.optimizer.optimizer
    steps = [state["step"].data_ptr() for state in optimizer.state.values()]
    report = {
        "left_over": [entry.name for entry in path.parent.iterdir() if entry != path],
        "weight_decay": [own, [group["weight_decay"] for group in run.engine.optimizer.param_groups]],
        "groups_and_steps": [len(optimizer.param_groups), len(set(steps))],
        "differing": differing_states(path, again) if run.rank == 0 else [],
        "losses": run.train(range(BEFORE, BEFORE + AFTER)),
    }
    if run.rank == 0:
        (root / f"{before.name}-{after.name}.json").write_text(json.dumps(report))
    run.close()


def differing_states(left: Path, right: Path) -> list[str]:
    from eve_ds.engine.checkpoint_record import Manifest, load_file
    from eve_ds.engine.whole_weights import MASTER, STATES, ShardedState

    a, b = (ShardedState(path, Manifest.read(path)) for path in (left, right))
    assert set(a.names) == set(b.names)
    masters = {name: a.whole(name) for name in a.names}
    experts = [name for name in a.names if a.num_experts(name)]
    assert len(experts) == 6 and all(float(a.whole(name, "exp_avg_sq").sum()) > 0 for name in experts)
    found = [f"{key} of {name}" for name in a.names for key in STATES if not _equal(a, b, name, key)]
    for state in (a, b):
        ranks = range(state.world_size)
        state.with_masters([load_file(state.path / f"averages_rank_{rank}.pt")["averages"] for rank in ranks])
    assert not any(torch.equal(a.whole(name), masters[name]) for name in a.names)
    return found + [f"average of {name}" for name in a.names if not _equal(a, b, name, MASTER)]


def _equal(a: Any, b: Any, name: str, key: str) -> bool:
    return torch.equal(a.whole(name, key), b.whole(name, key))


def check_report(root: Path, before: Case, after: Case, expected: list[float]) -> None:
    report = json.loads((root / f"{before.name}-{after.name}.json").read_text())
    assert report["differing"] == [] and report["left_over"] == []
    own, loaded = report["weight_decay"]
    assert loaded == own and set(own) == {0.0, 0.1}, "hyper-parameters stay the config's"
    groups, steps = report["groups_and_steps"]
    assert steps == groups >= 4, "groups share a count of steps"
    worst = max(abs(a - b) for a, b in zip(report["losses"], expected, strict=True))
    assert worst < TOLERANCE[before.precision]


def plain_losses() -> list[float]:
    """Of one process without DeepSpeed, from the step of the change on."""
    from eve_ds.engine.optim import decayed

    task = masked_task()
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    decays = decayed(task)
    for name, parameter in task.named_parameters():
        groups[name in decays].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[decay], "weight_decay": 0.1 * decay} for decay in groups],
        lr=1e-2,
        betas=(0.9, 0.98),
        eps=1e-4,
    )
    losses = []
    for step in range(BEFORE + AFTER):
        output = task(caption_batch(ROWS, seed=step))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss.detach()))
    return losses[BEFORE:]


BY_ONE = [Case(1, 1, stage) for stage in (1, 2, 3)]
BY_TWO = [*(Case(2, 2, stage) for stage in (1, 2, 3)), *(Case(2, 2, stage, "bf16") for stage in (2, 3))]
TO_ONE = [(case, case._replace(world=1, ep_size=1)) for case in BY_TWO]
TO_TWO = [(case, case._replace(world=2, ep_size=2)) for case in BY_ONE]
OTHERS = [
    (Case(2, 2, 1), Case(2, 1, 3)),  # also across ZeRO stages
    (Case(2, 2, 3), Case(2, 1, 2)),
    (Case(2, 2, 2), Case(2, 1, 1, groups=5_000)),  # as many groups as a big model has: more than in the file
]


def spawn(world_size: int, root: Path, *tasks: Case | tuple[Case, Case]) -> None:
    run_distributed_test(work, world_size, args=(root, *tasks), timeout=600)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that two ranks wrote, and reports on what came of them at other stages and all experts on a rank."""
    root = tmp_path_factory.mktemp("universal")
    spawn(2, root, *BY_TWO, *OTHERS)
    return root


@pytest.fixture(scope="module")
def checkpoints(by_two: Path) -> Path:
    """The same, read by one rank, and with that rank's own."""
    spawn(1, by_two, *TO_ONE, *BY_ONE)
    return by_two


@pytest.fixture(scope="module")
def expected() -> list[float]:
    return plain_losses()


@pytest.fixture(scope="module")
def back_to_two(checkpoints: Path) -> Path:
    spawn(2, checkpoints, *TO_TWO)
    return checkpoints


def names(changes: list[tuple[Case, Case]]) -> list[str]:
    return [f"{before.name}-{after.name}" for before, after in changes]


@pytest.mark.parametrize(("before", "after"), OTHERS, ids=names(OTHERS))
def test_other_placements_and_stages_go_on(by_two: Path, expected: list[float], before: Case, after: Case) -> None:
    check_report(by_two, before, after, expected)


@pytest.mark.parametrize(("before", "after"), TO_ONE, ids=names(TO_ONE))
def test_one_rank_goes_on_where_two_were(checkpoints: Path, expected: list[float], before: Case, after: Case) -> None:
    check_report(checkpoints, before, after, expected)


@pytest.mark.parametrize(("before", "after"), TO_TWO, ids=names(TO_TWO))
def test_two_ranks_go_on_where_one_was(back_to_two: Path, expected: list[float], before: Case, after: Case) -> None:
    check_report(back_to_two, before, after, expected)


@pytest.mark.long
def test_four_ranks_take_over_from_two_and_give_back(expected: list[float], tmp_path: Path) -> None:
    four, two = [Case(4, 4, 2), Case(4, 2, 3)], [Case(2, 2, 2), Case(2, 2, 3)]
    over, back = list(zip(two, four, strict=True)), [(four[1], two[0]), (four[0], two[1])]
    spawn(2, tmp_path, *two)
    spawn(4, tmp_path, *over, *four)
    spawn(2, tmp_path, *back)
    for before, after in over + back:
        check_report(tmp_path, before, after, expected)


@pytest.mark.parametrize("case", BY_TWO + BY_ONE, ids=lambda case: case.name)
def test_consolidated_state_is_that_of_the_run(checkpoints: Path, case: Case) -> None:
    from eve_ds.engine.whole_weights import consolidated_state

    state = consolidated_state(checkpoints / case.name / f"step_{BEFORE:08d}")
    expected = torch.load(checkpoints / f"{case.name}.state", weights_only=True)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert all(value.dtype == torch.float32 for value in state.values())


def altered(checkpoints: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the ZeRO 2 checkpoint with other values in its manifest; None takes a key away."""
    path = shutil.copytree(checkpoints / Case(2, 2, 2).name / f"step_{BEFORE:08d}", folder / f"step_{BEFORE:08d}")
    record = json.loads((path / "complete.json").read_text())
    del record["digest"]  # as older manifests are; with it the same is called damaged
    for key, value in changes.items():
        if value is None:
            del record[key]
        else:
            record[key] = {**record[key], **value} if isinstance(value, dict) else value
    (path / "complete.json").write_text(json.dumps(record))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts": None}, "does not record experts"),
        ({"deepspeed_version": None}, "does not record deepspeed_version"),
        ({"topology": None}, "damaged"),
        ({"topology": {"world_size": 4}}, "world_size 4 but"),
        ({"topology": {"expert_parallel_size": 1}}, "expert_parallel_size"),
        ({"topology": {"zero_stage": 1}}, "zero_stage 1 but"),
        ({"topology": {"zero_stage": 3}}, "not readable"),
        ({"experts": {"backbone.blocks.1.moe": {"num_experts": 4}}}, "says experts"),
        ({"deepspeed_version": "0.18.0"}, "written by DeepSpeed 0.18.0"),
        ({"files": {"mp_rank_00_model_states.pt": [1, ""]}}, "has [0-9]+ bytes, not 1"),
        ({"files": {"more.pt": [1, ""]}}, "more.pt is missing"),
    ],
)
def test_a_manifest_that_its_files_do_not_bear_out_is_refused(
    checkpoints: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    from eve_ds.engine.whole_weights import consolidated_state
    from preprocessing.errors import UserError

    with pytest.raises(UserError, match=words) as refused:
        consolidated_state(altered(checkpoints, tmp_path, **changes))
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_file_that_would_run_code_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    from eve_ds.engine.checkpoint_record import hash_files
    from eve_ds.engine.whole_weights import consolidated_state
    from preprocessing.errors import UserError

    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path = altered(checkpoints, tmp_path)
    torch.save({"optimizer_state_dict": Hostile(tmp_path / "ran")}, path / name)
    record = json.loads((path / "complete.json").read_text())
    record["files"][name] = hash_files(path, [name])[name]
    (path / "complete.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="not readable"):
        consolidated_state(path)
    assert not (tmp_path / "ran").exists()


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    from eve_ds.engine.whole_weights import consolidated_state
    from preprocessing.errors import UserError

    with pytest.raises(UserError, match="no whole checkpoint"):
        consolidated_state(tmp_path)
