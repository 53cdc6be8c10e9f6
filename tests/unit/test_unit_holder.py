"""What a worker holds when plans come and go."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from p2pinfer.core.planner import make_plan
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.topology import Topology, topology, weight_bytes
from p2pinfer.errors import LocalProtocolError
from p2pinfer.model.config import load_config, model_spec
from p2pinfer.types import Fence, Plan, SamplingParams
from p2pinfer.unit_holder import UnitHolder
from p2pinfer.wire.messages import Slot
from tests.lockstep import members
from tests.random_models import write_random_model

CPU = torch.device("cpu")
SLOT = Slot(
    request_id=1, start=0, tokens=(5, 6, 7), capacity=20, params=SamplingParams(), prompt_tokens=3
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model."""
    return write_random_model(tmp_path_factory.mktemp("model"), seed=3)


def plan(folder: Path) -> Plan:
    """Two members hold the model."""
    return make_plan(
        members=members(2),
        model=model_spec(load_config(folder), name="t", model_id="0" * 64),
        layout="heads",
        fence=Fence(1, 1),
        cluster_id="0" * 16,
        leader_id="0" * 16,
    )


def swapped(base: Plan, *kinds: str) -> Topology:
    """Member 0's part where the two members change places for some kinds of units."""
    stage = base.stages[0]
    for kind in kinds:
        owners = tuple(1 - owner for owner in getattr(stage, kind))
        stage = msgspec.structs.replace(stage, **{kind: owners})
    return topology(msgspec.structs.replace(base, stages=(stage,)), 0)


def holder(folder: Path | None, logs: TokenLogs) -> UnitHolder:
    """A holder that tells nobody of its progress."""
    return UnitHolder(folder, CPU, logs, lambda _done, _total: None)


def holding_some(folder: Path) -> tuple[UnitHolder, TokenLogs, Plan]:
    """Member 0 holds its units, and KV of three positions of request 1."""
    logs, base = TokenLogs(), plan(folder)
    units = holder(folder, logs)
    units.hold(topology(base, 0))
    assert units.runner is not None
    logs.write(base.fence, SLOT)
    units.runner.cache.open(1, 20)
    units.runner.cache.finish(1, 3)
    logs.finish((SLOT,))
    return units, logs, base


def test_the_same_units_are_kept(folder: Path) -> None:
    """With their KV; nothing is loaded again."""
    units, logs, base = holding_some(folder)
    before = units.runner
    mine = topology(msgspec.structs.replace(base, fence=Fence(1, 2)), 0)
    units.hold(mine)
    assert units.runner is before
    assert units.weight_bytes == weight_bytes(base.model, mine.holding)
    assert (logs.covered(1), units.kv_used_bytes > 0) == (3, True)


def test_kv_stays_where_the_heads_stay(folder: Path) -> None:
    """Other MLP or vocab units are loaded, and the KV goes on."""
    units, logs, base = holding_some(folder)
    before = units.runner
    assert before is not None
    units.hold(swapped(base, "mlp_owners", "vocab_owners"))
    assert units.runner is not None
    assert units.runner is not before
    assert units.runner.cache is before.cache
    assert logs.covered(1) == 3


def test_kv_of_other_heads_is_lost(folder: Path) -> None:
    """The logs stay, and say that nothing is covered."""
    units, logs, base = holding_some(folder)
    units.hold(swapped(base, "head_owners"))
    assert (logs.covered(1), list(logs.tokens(1))) == (0, [5, 6, 7])
    assert units.kv_used_bytes == 0


def test_agreed_logs_say_what_is_of_use(folder: Path) -> None:
    """KV of requests that are gone is freed, that of cut logs is cut."""
    units, logs, _ = holding_some(folder)
    assert units.runner is not None
    cache = units.runner.cache
    told = msgspec.structs.replace(logs.snapshot()[0][0], tokens=(5, 9))
    units.adopt(logs.adopt((told,)), (1,))
    assert (logs.covered(1), cache.covered(1)) == (1, 1)
    units.adopt(logs.adopt(()), ())
    assert len(cache) == 0


def test_a_witness_holds_nothing(folder: Path) -> None:
    """A plan that gives it units cannot be loaded."""
    logs, base = TokenLogs(), plan(folder)
    units = holder(None, logs)
    with pytest.raises(LocalProtocolError, match="witness"):
        units.hold(topology(base, 0))
    stage = msgspec.structs.replace(
        base.stages[0],
        head_owners=tuple(1 for _ in base.stages[0].head_owners),
        mlp_owners=tuple(1 for _ in base.stages[0].mlp_owners),
        vocab_owners=tuple(1 for _ in base.stages[0].vocab_owners),
    )
    units.hold(topology(msgspec.structs.replace(base, stages=(stage,)), 0))
    units.adopt((), ())
    assert (units.runner, units.weight_bytes, units.kv_used_bytes) == (None, 0, 0)


def test_a_load_that_fails_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """Neither units nor coverage; the next plan is loaded from the beginning."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    units, logs, base = holding_some(copy)
    weights = [file for file in copy.iterdir() if file.suffix == ".safetensors"]
    for file in weights:
        file.rename(file.with_suffix(".away"))
    with pytest.raises(Exception, match="safetensors"):
        units.hold(swapped(base, "mlp_owners"))
    assert (units.runner, logs.covered(1)) == (None, 0)
    for file in weights:
        file.with_suffix(".away").rename(file)
    units.hold(topology(base, 0))
    assert units.runner is not None
