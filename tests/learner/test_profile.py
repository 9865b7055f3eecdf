"""One step of a rank is profiled, and no other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from l0fast.ipc import Message
from l0fast.learner.profile import StepProfile


@pytest.mark.parametrize("begins", [{}, {"op": "load_checkpoint"}])
def test_one_step_is_in_the_file_and_no_other(tmp_path: Path, begins: dict[str, str]):
    version = 4 if begins else 0
    said: list[str] = []
    work = {"accumulate": torch.cos, "finish_step": torch.sin, "save": torch.exp}

    def answer(message: Message) -> dict[str, Any]:
        op = message.header["op"]
        if op == "load_checkpoint":
            return {"policy_version": version}
        # seen by the name of what is computed: cos, cosh, tan of the three steps
        return {"done": str(steps.get((op, len(finished)), work[op])(torch.ones(3)))}

    finished: list[int] = []
    steps = {("accumulate", 0): torch.cosh, ("accumulate", 2): torch.tan}
    path = tmp_path / "torch_rank_0.json"
    profile = StepProfile(answer, path, version + 2, lambda: said.append("writing"))
    if begins:
        profile.answer(Message(begins, b""))
    for step in range(1, 4):
        profile.answer(Message({"op": "save"}, b""))
        profile.answer(Message({"op": "accumulate"}, b""))
        assert "done" in profile.answer(Message({"op": "finish_step", "policy_version": version + step}, b""))
        finished.append(step)
    names = {e["name"] for e in json.loads(path.read_bytes())["traceEvents"]}
    assert {"aten::cos", "aten::sin"} <= names
    assert names.isdisjoint({"aten::cosh", "aten::tan", "aten::exp"})
    assert said == ["writing"]
