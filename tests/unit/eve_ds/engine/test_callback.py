"""Hooks that are overridden, and the states of callbacks: what is stored, under which name, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eve_ds.engine import checkpoint
from eve_ds.engine.callback import HOOKS, Callback, collect_states, overridden, restore_states
from eve_ds.engine.checkpoint_record import Manifest
from preprocessing.errors import UserError
from tests.support.made_checkpoint import make_checkpoint

NAME = f"{__name__}:Counter"


class Counter(Callback):
    def __init__(self, state: Any = None) -> None:
        self.state: Any = state or {}

    def step_end(self, trainer: Any, record: dict[str, float]) -> None:
        self.state["steps"] = self.state.get("steps", 0) + 1

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def test_only_hooks_that_are_overridden_are_called() -> None:
    plain, counter, patched = Callback(), Counter(), Callback()
    patched.fit_end = lambda trainer: None  # type: ignore[method-assign]
    found = {hook: overridden([plain, counter, patched], hook) for hook in HOOKS}
    assert {hook: len(methods) for hook, methods in found.items() if methods} == {"step_end": 1, "fit_end": 1}
    found["step_end"][0](None, {})
    assert counter.state == {"steps": 1}


def test_states_go_back_to_the_callbacks_they_came_from() -> None:
    states = collect_states([Counter({"steps": 3}), Callback(), Counter({"steps": 5})])
    assert states == {NAME: {"steps": 3}, f"{NAME}#2": {"steps": 5}}
    first, second = Counter(), Counter()
    assert restore_states([first, second], states) == []
    assert (first.state, second.state) == ({"steps": 3}, {"steps": 5})
    assert restore_states([Callback(), first], states) == [f"{NAME}#2"]
    assert restore_states([first], {}) == [] and first.state == {"steps": 3}


def test_callbacks_without_a_state_store_nothing() -> None:
    assert collect_states([Callback(), Counter()]) == {}


def test_a_state_is_read_as_it_was_stored_and_runs_no_code(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 3)
    state = {"weights": module.state_dict(), "best": np.float64(1.5), "seen": (1, True, None, "a"), 7: torch.ones(2)}
    path = make_checkpoint(tmp_path, 3)
    assert checkpoint.load_callback_states(path, Manifest.read(path)) == {}  # as former versions wrote it
    torch.save(collect_states([Counter(state)]), path / checkpoint.CALLBACKS)
    manifest = Manifest(**{**vars(Manifest.read(path)), "files": {checkpoint.CALLBACKS: (0, "")}})
    found = checkpoint.load_callback_states(path, manifest)[NAME]
    assert torch.equal(found["weights"]["bias"], module.bias) and not found["weights"]["bias"].requires_grad
    assert (found["best"], found["seen"]) == (1.5, [1, True, None, "a"]) and torch.equal(found[7], torch.ones(2))


def test_a_state_that_could_not_be_read_again_is_refused() -> None:
    with pytest.raises(UserError, match=rf"callback {NAME}: state_dict\(\)\['a'\]\[1\] is a set; return tensors"):
        collect_states([Counter({"a": [1, {2}]})])
