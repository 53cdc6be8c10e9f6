"""Runs a whole plan in one process: every node's true runner, exchanging in lockstep.

No network and no threads: what a step yields is answered from the other runners' yields. Used by
the tests of the arithmetic; the same runners behind ZeroMQ are tested by processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from p2pinfer.core.holdings import Holding, holdings, stage_members
from p2pinfer.core.planner import make_plan
from p2pinfer.core.topology import topology
from p2pinfer.core.units import unit_bounds
from p2pinfer.model.checkpoint import Checkpoint
from p2pinfer.model.config import load_config, model_spec
from p2pinfer.model.part import Part, empty_cache, holding_of, units_of
from p2pinfer.model.reduction import subtree_sums, whole_sum
from p2pinfer.model.runner import GiveHidden, NeedHidden, NeedSum, StageRunner
from p2pinfer.model.stage_loader import StageLoader
from p2pinfer.model.weights import Weights
from p2pinfer.types import DType, Fence, Member, Plan, UnitKind
from p2pinfer.wire.messages import Slot

CPU = torch.device("cpu")


def members(count: int, weights: Sequence[float] | None = None) -> list[Member]:
    """`count` members that differ in name, id and, if given, weight."""
    return [
        Member(
            node_id=f"{i:016x}",
            boot_id=f"{i:016x}",
            name=f"node{i + 1}",
            address=f"tcp://127.0.0.1:{7720 + 10 * i}",
            weight=weights[i] if weights else 1.0,
        )
        for i in range(count)
    ]


def dealt(held: Holding, parts: int, spare: Holding | None = None) -> list[Holding]:
    """The units of a holding, dealt out over `parts` like cards; those of `spare` come along."""
    units = sorted(units_of(held)) + sorted(units_of(spare) if spare else ())
    return [holding_of(units[i::parts], 0) for i in range(min(parts, len(units)))]


class Lockstep:
    """All nodes of one plan of the model in `folder`.

    Each node's units are in `parts` parts. With `spare`, what the next member of its stage owns is
    in these parts too, as of a standby that was given a part of what it kept ready. `change` makes
    another plan of the one that is made anew.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 1,
        layout: str = "heads",
        dtype: DType | None = None,
        quant: str = "none",
        wire_dtype: str = "float32",
        weights: Sequence[float] | None = None,
        device: torch.device = CPU,
        parts: int = 1,
        spare: bool = False,
        change: Callable[[Plan], Plan] = lambda plan: plan,
    ) -> None:
        self.config = load_config(folder)
        self.model = model_spec(
            self.config,
            name="test",
            model_id="0" * 64,
            dtype=dtype or self.config.dtype,
            quant=quant,
            wire_dtype=wire_dtype,
        )
        self.plan: Plan = change(
            make_plan(
                members=members(nodes, weights),
                model=self.model,
                layout=layout,
                fence=Fence(1, 1),
                cluster_id="0" * 16,
                leader_id="0" * 16,
            )
        )
        self.weights = Weights(Checkpoint.open(folder, self.config))
        loader = StageLoader(self.weights, self.config, self.model, device)
        self.topologies = [topology(self.plan, i) for i in range(nodes)]
        self.runners: dict[int, StageRunner] = {}
        for index in range(nodes):
            roles = self.topologies[index].roles
            if not roles:
                continue
            pieces, trunks = [], {}
            for role in roles:
                held = role.holding
                peers = [
                    each
                    for peer in role.peers
                    for each in holdings(self.plan, peer)
                    if each.stage == held.stage
                ]
                other = peers[index % len(peers)] if spare and peers else None
                for piece in dealt(held, parts, other):
                    part = Part(piece, empty_cache(piece, self.model, device))
                    part.stage = loader.load(piece)
                    pieces.append(part)
                trunks[held.span] = loader.trunk(held.span)
            owned = self.topologies[index].holdings
            self.runners[index] = StageRunner(pieces, owned, trunks, self.model, device)

    def under(self, plan: Plan, runners: dict[int, StageRunner]) -> None:
        """From now on these runners compute, by member of `plan`, of the same model."""
        self.plan, self.runners = plan, runners
        self.topologies = [topology(plan, i) for i in range(len(plan.members))]

    def step(self, slots: Sequence[Slot]) -> np.ndarray:
        """Logits [sampling slots, vocab] of one step, float32."""
        pieces: dict[int, torch.Tensor] = {}
        runs = {index: runner.run(slots) for index, runner in self.runners.items()}
        needs = {i: next_or_done(run, None, pieces, self, i) for i, run in runs.items()}
        for i, mine in enumerate(self.topologies):
            assert mine.roles or not needs.get(i), "who owns nothing needs nobody"
        hidden: list[torch.Tensor] = []
        for stage in range(len(self.plan.stages)):
            nodes = stage_members(self.plan, stage)
            for i in nodes:
                if isinstance(needs[i], NeedHidden):
                    assert self.topologies[i].role(stage).hidden_from is not None
                    needs[i] = next_or_done(runs[i], hidden[-1], pieces, self, i)
            while any(needs[i] and needs[i].stage == stage for i in nodes):
                answers = self._answers({i: needs[i] for i in nodes}, hidden)
                needs |= {i: next_or_done(runs[i], answers[i], pieces, self, i) for i in nodes}
        assert not any(needs.values()), "every stage is computed to its end"
        for runner in self.runners.values():
            runner.foresee(slots)
        if not pieces:
            return np.zeros((0, self.model.vocab_size), np.float32)
        return torch.cat([pieces[u] for u in sorted(pieces)], dim=1).cpu().numpy()

    def _answers(self, needs: dict, hidden: list[torch.Tensor]) -> dict[int, torch.Tensor | None]:
        """What each member of a stage gets for its need; the states that leave it join `hidden`."""
        first = next(iter(needs.values()))
        if isinstance(first, GiveHidden):
            assert all(torch.equal(first.hidden, need.hidden) for need in needs.values())
            hidden.append(first.hidden.clone())
            return dict.fromkeys(needs)
        assert isinstance(first, NeedSum)
        units = self.topologies[0].units[first.half]
        sent: dict[int, torch.Tensor] = {}
        for need in needs.values():
            assert (need.layer, need.half) == (first.layer, first.half)
            if need.partials:
                sent.update(subtree_sums(need.partials, units))
        # Each node adds in its own order of arrival: the sum may not depend on it.
        orders = (dict(sent), dict(reversed(sent.items())))
        return {node: whole_sum(orders[place % 2], units) for place, node in enumerate(needs)}

    def prefill(
        self,
        tokens: Sequence[int],
        *,
        request_id: int = 1,
        chunk: int = 10**9,
        start: int = 0,
        capacity: int = 512,
    ) -> np.ndarray:
        """Logits [1, vocab] after the last of `tokens`, computed in chunks."""
        logits = np.zeros((0, 0), np.float32)
        end = start
        while end < start + len(tokens):
            piece = tuple(tokens[end - start : end - start + chunk])
            last = end + len(piece) == start + len(tokens)
            first = capacity if end == 0 else 0
            slot = Slot(request_id=request_id, start=end, tokens=piece, sample=last, capacity=first)
            logits = self.step((slot,))
            end += len(piece)
        return logits

    def greedy(
        self, prompt: Sequence[int], count: int, *, chunk: int = 10**9
    ) -> tuple[list[int], np.ndarray]:
        """`count` greedy tokens after `prompt`, and the logits [count, vocab] they came from."""
        rows = [self.prefill(prompt, chunk=chunk, capacity=len(prompt) + count)[0]]
        tokens = [int(rows[0].argmax())]
        while len(tokens) < count:
            position = len(prompt) + len(tokens) - 1
            slot = Slot(request_id=1, start=position, tokens=(tokens[-1],), sample=True)
            rows.append(self.step((slot,))[0])
            tokens.append(int(rows[-1].argmax()))
        for runner in self.runners.values():
            runner.forget((1,))
        return tokens, np.stack(rows)


def next_or_done(run, answer, pieces, lockstep: Lockstep, node: int):  # type: ignore[no-untyped-def]
    """Advance a run; at its end file its logits by vocab unit and return None."""
    try:
        return run.send(answer)
    except StopIteration as done:
        units = lockstep.topologies[node].vocab_units
        if done.value is not None:
            model = lockstep.topologies[node].plan.model
            bounds = [unit_bounds(model, UnitKind.VOCAB, unit) for unit in units]
            own = torch.split(done.value, [end - start for start, end in bounds], dim=1)
            pieces.update(zip(units, own, strict=True))
        return None
