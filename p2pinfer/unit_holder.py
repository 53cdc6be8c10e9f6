"""The units that a worker holds: loaded once, kept as long as plans give it the same.

They lie in parts (`model/part.py`). A plan that promotes a standby changes what is computed with,
and nothing lies elsewhere than before: that takes no time. What it owns and has not ready is loaded
before the plan may go on, what it keeps for others in the background once the plan is in force:
`hot`, as if it were owned, or `warm`, in the page cache only. Then a promotion loads it from there.

A part of which units were given away goes on computing with all of its column-parallel products.
So what is still owned of it is loaded anew by itself, in the background too, and takes its place
between two steps, if there is memory for both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from math import inf
from pathlib import Path
from typing import NamedTuple

import torch

from p2pinfer import heap
from p2pinfer.core.coverage import KvUnit
from p2pinfer.core.holdings import Holding, owners_of, standbys_of
from p2pinfer.core.inputs import input_spans
from p2pinfer.core.shares import room_of
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.topology import Topology, weight_bytes
from p2pinfer.core.units import Slice
from p2pinfer.device import offered_memory
from p2pinfer.errors import LocalProtocolError
from p2pinfer.model.checkpoint import Checkpoint
from p2pinfer.model.config import LlamaConfig, load_config
from p2pinfer.model.input_store import InputStore
from p2pinfer.model.kv_cache import KvCache
from p2pinfer.model.llama import Trunk, compute_dtype
from p2pinfer.model.page_cache import PageReader
from p2pinfer.model.part import Part, Unit, empty_cache, holding_of, units_of
from p2pinfer.model.runner import StageRunner
from p2pinfer.model.stage_loader import StageLoader, packer_of
from p2pinfer.model.weights import Weights
from p2pinfer.standby_loader import StandbyLoader
from p2pinfer.types import ModelSpec, Plan, UnitKind
from p2pinfer.wire.tensors import Tensor

PROGRESS_EVERY_S = 0.1
"""A worker that says nothing for a while counts as hung, also while it loads."""

MIB = 1 << 20


class StandbyReady(NamedTuple):
    """Of how many standby units the weights are ready, and of how many they should be."""

    ready: int
    wanted: int


class _Waiting(NamedTuple):
    """Parts to load, and parts to bring into the page cache and keep there."""

    load: list[Part]
    warm: list[Part]


def kept_units(plan: Plan, member: int) -> tuple[Holding, ...]:
    """What a member is a standby of, by stage and then owner."""
    found: dict[tuple[int, int], set[Unit]] = {}
    for number, stage in enumerate(plan.stages):
        span = Slice(stage.start, stage.end)
        by_kind = zip(UnitKind, owners_of(stage), standbys_of(stage), strict=True)
        for kind, owners, copies in by_kind:
            for unit, members in enumerate(copies):
                if member in members:
                    group = found.setdefault((number, owners[unit]), set())
                    group.add(Unit(span, kind, unit))
    return tuple(holding_of(units, number) for (number, _), units in sorted(found.items()))


class UnitHolder:
    """Weights and KV of one node. `folder` is the model's; None for a witness, which has none.

    `progress` is called several times a second while loading what is owned, with the bytes that are
    loaded and those of all (both 0 while KV is copied). `standby` is `hot` or `warm`, how the
    weights of units are kept that others own; `auto`: hot as long as there is memory for them, of
    which the device has `available` bytes left when they are asked for. Quantised weights are kept
    in the folder `copies`.
    """

    def __init__(
        self,
        folder: Path | None,
        device: torch.device,
        logs: TokenLogs,
        progress: Callable[[int, int], None],
        *,
        standby: str = "auto",
        available: Callable[[torch.device], int] = offered_memory,
        copies: Path | None = None,
    ) -> None:
        self._folder = folder
        self._copies = copies
        self._config: LlamaConfig | None = load_config(folder) if folder else None
        self._device = device
        self._logs = logs
        self._progress = progress
        self._standby = standby
        self._available = available
        self._parts: list[Part] = []
        """No unit is in two of them; a request that is open in one is open in all."""
        self._places: dict[KvUnit, Part] = {}
        self._own: frozenset[Unit] = frozenset()
        self._model: ModelSpec | None = None
        self._wanted: tuple[tuple[Holding, ...], tuple[Holding, ...]] | None = None
        self._trunks: dict[Slice, Trunk] = {}
        """Of the stages of which this node owns any unit."""
        self._inputs: dict[Slice, InputStore] = {}
        """Of these stages, if this node is to keep them."""
        self._standbys: StandbyLoader | None = None
        self._trims: list[Part] = []
        """Parts to be, of units that parts here have together with others."""
        self._left: list[Part] = []
        """Parts that were given up, and are freed when this node's word that it has the plan is on
        its way: that takes a while, and nothing else needs the room."""
        self._room = inf
        self._told = 0.0
        self.standby_reason = ""
        """Why what is kept for others is warm though nobody has said that it should be."""
        self.runner: StageRunner | None = None
        """None where the last plan gave this node nothing to own or to keep."""

    # --- what is here -----------------------------------------------------------------------------

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights held, those of standby units too."""
        return sum(part.loaded_bytes for part in (*self._parts, *self._trims))

    @property
    def kv_used_bytes(self) -> int:
        """Bytes of KV written of units that this node owns."""
        return self._kv_bytes(owned=True)

    @property
    def kv_standby_bytes(self) -> int:
        """Bytes of KV written of units that this node keeps for others."""
        return self._kv_bytes(owned=False)

    @property
    def kv_inputs_bytes(self) -> int:
        """Bytes of kept inputs."""
        return sum(store.used_bytes for store in self._inputs.values())

    def _kv_bytes(self, *, owned: bool) -> int:
        heads = {(unit.span, unit.number) for unit in self._own if unit.kind is UnitKind.HEAD}
        return sum(
            part.cache.unit_used_bytes * sum((unit in heads) == owned for unit in part.kv_units)
            for part in self._parts
        )

    @property
    def standby_ready(self) -> StandbyReady:
        """How far loading or warming in the background is."""
        units = [(part, len(part.units - self._own)) for part in self._parts]
        ready = sum(count for part, count in units if self._ready(part))
        return StandbyReady(ready, sum(count for _, count in units))

    @property
    def standby_units_warm(self) -> int:
        """How many of these units have their weights in the page cache only."""
        return sum(len(part.units) for part in self._parts if part.stage is None and part.warm)

    def _ready(self, part: Part) -> bool:
        """Whether a part has what it is to have: what is owned is in memory, never warm only."""
        return part.stage is not None or (part.warm and not part.units & self._own)

    @property
    def standby_weight_bytes(self) -> int:
        """Bytes of weights held of parts of which this node owns nothing."""
        return sum(part.loaded_bytes for part in self._parts if not part.units & self._own)

    @property
    def standby_error(self) -> str:
        """Why some of it could not be loaded or warmed; empty where nothing failed."""
        return next((part.error for part in self._parts if part.error), "")

    # --- plans ------------------------------------------------------------------------------------

    def hold(self, mine: Topology) -> None:
        """Hold what a plan gives to this node, ready to compute what it owns.

        KV of units that stay, owned or kept for another, stays. Raises what reading the model's
        files raises: nothing is held then, and no coverage left.
        """
        wanted = (mine.holdings, kept_units(mine.plan, mine.me))
        if wanted == self._wanted:
            return
        self.close()
        self.runner = self._wanted = None
        model = self._model = mine.plan.model
        self._room = room_of(mine.plan.members[mine.me])
        self._told = time.monotonic()
        try:
            self._arrange(model, *wanted)
            self._keep_inputs(mine)
            self._load_own(model, mine.holdings)
        except BaseException:  # whatever it is: coverage of KV that is not held would be believed
            self._own, self._parts, self._places, self._trunks = frozenset(), [], {}, {}
            self._trims, self._inputs = [], {}
            self._logs.coverage.lose(self._logs.coverage.computed | self._logs.coverage.fed)
            self._logs.inputs.lose()
            raise
        self._wanted = wanted
        if self._parts:
            self.runner = StageRunner(
                self._parts, mine.holdings, self._trunks, model, self._device, inputs=self._inputs
            )

    def _arrange(self, model: ModelSpec, own: Sequence[Holding], kept: Sequence[Holding]) -> None:
        """Keep the parts that still serve, make new ones of the other units, and bring their KV
        there."""
        own_units = frozenset[Unit]().union(*map(units_of, own))
        wanted = own_units.union(*map(units_of, kept))
        stay = [part for part in self._parts if self._serves(part, own_units, wanted)]
        left = [part for part in self._parts if part not in stay]
        self._left = left
        if wanted:
            self._free()
        placed = {unit for part in stay for unit in part.units}
        new: list[Part] = []
        for held in (*own, *kept):
            units = units_of(held) - placed
            if units:
                piece = holding_of(units, held.stage)
                new.append(Part(piece, self._cache(piece, model, left, self._tell)))
        self._own, self._parts = own_units, [*stay, *new]
        self._trims = self._trimmed(wanted)
        self._places = {unit: part for part in self._parts for unit in part.kv_units}
        for part in left:
            self._logs.coverage.lose(part.kv_units.keys() - self._places.keys())

    def _free(self) -> None:
        for part in self._left:
            part.unload()
        self._left = []

    def _keep_inputs(self, mine: Topology) -> None:
        """Inputs stay where a plan gives this node units of the same span; those of other spans are
        of no use any more."""
        model = mine.plan.model
        dtype = compute_dtype(model)
        before = self._inputs
        self._inputs = {
            span: before.get(span) or InputStore(span, model.hidden_size, dtype, self._device)
            for span in input_spans(mine.plan, mine.me)
        }

    def _serves(self, part: Part, own: frozenset[Unit], wanted: frozenset[Unit]) -> bool:
        """Whether a part is to stay as it is.

        One that is ready is not given up for what it has beside units that are owned now: to load
        these anew would take long. But a part of which a unit was given away, and is not even kept
        for its new owner, is loaded anew without it.
        """
        owned = part.units & own
        given_away = (part.units & self._own) - wanted
        if part.stage is None:
            begun = part.loaded_bytes > 0 or part.warm
            return part.units <= (own if owned else wanted) and begun
        return (part.units <= wanted or bool(owned)) and not (owned and given_away)

    def _cache(
        self,
        held: Holding,
        model: ModelSpec,
        left: Iterable[Part],
        tell: Callable[[int, int], None],
    ) -> KvCache:
        """The KV of a new part's head units, from the parts that are given up; `tell` is called
        after each unit."""
        for part in left:
            before = part.held
            if (before.span, before.head_units) == (held.span, held.head_units):
                return part.cache
        cache = empty_cache(held, model, self._device)
        if self._parts:
            for request_id, capacity in self._parts[0].cache.capacities.items():
                cache.open(request_id, capacity)
        for place, number in enumerate(held.head_units):
            unit = KvUnit(held.span, number)
            for part in left:
                if unit in part.kv_units:
                    cache.copy(place, part.cache, part.kv_units[unit])
                    tell(0, 0)
        return cache

    def _load_own(self, model: ModelSpec, own: Sequence[Holding]) -> None:
        """Load what is owned and not ready; the parts that are given up are freed by now."""
        if not self._own:
            return
        loader, before = self._loader(), self._trunks
        self._trunks = {
            held.span: before.get(held.span) or loader().trunk(held.span) for held in own
        }
        parts = [part for part in self._parts if part.units & self._own and part.stage is None]
        if not parts:
            return
        done = sum(part.loaded_bytes for part in parts)
        total = sum(weight_bytes(model, part.held) for part in parts)
        self._progress(done, total)
        self._told = time.monotonic()
        for part in parts:
            while (more := part.load_piece(loader)) is not None:
                done += more
                self._tell(done, max(done, total))
        heap.settle()

    def _tell(self, done: int, total: int) -> None:
        """Say how far loading is, if that was not said just now."""
        if time.monotonic() - self._told >= PROGRESS_EVERY_S:
            self._told = time.monotonic()
            self._progress(done, total)

    def _loader(self) -> Callable[[], StageLoader]:
        """What opens the model's files."""
        folder, config, model = self._folder, self._config, self._model
        if folder is None or config is None or model is None:
            raise LocalProtocolError("a plan gives units to a witness, which has no model")

        def loader() -> StageLoader:
            weights = Weights(Checkpoint.open(folder, config))
            packer = packer_of(weights, model, self._device, self._copies)
            return StageLoader(weights, config, model, self._device, packer)

        return loader

    def adopt(self, gone: tuple[int, ...], kept: Mapping[int, int]) -> None:
        """The logs were agreed on: free the KV of all requests but those that are `kept`, for each
        of which there is room for so many positions from now on, be it computed soon or not.

        Positions of these beyond their coverage are void, and written again.
        """
        if self.runner is not None:
            self.runner.forget((*gone, *(self._parts[0].cache.capacities.keys() - kept.keys())))
            for request_id, positions in kept.items():
                self.runner.open(request_id, positions)

    # --- in the background ------------------------------------------------------------------------

    def _trimmed(self, wanted: frozenset[Unit]) -> list[Part]:
        """What parts that are owned only in part are to be replaced by: first what is owned of
        them, then what is kept for others. What was begun of that is gone on with."""
        begun = {part.units: part for part in self._trims}
        found = []
        for part in self._parts:
            owned = part.units & self._own
            for units in (owned, (part.units & wanted) - owned):
                if units and owned and units != part.units:
                    assert self._model is not None
                    piece = holding_of(units, part.held.stage)
                    known = begun.get(units)
                    found.append(
                        known or Part(piece, empty_cache(piece, self._model, self._device))
                    )
        return found

    def trim(self) -> bool:
        """Between two steps: free what is left of a plan before, and put parts in place that were
        loaded anew, once all are; returns whether there were any. Their KV is brought there."""
        if self._left:
            self._free()
            return True
        if not self._trims or self.runner is None:
            return False
        if not all(map(self._ready, (*self._parts, *self._trims))):
            return False
        assert self._model is not None
        new = self._trims
        placed = {unit for part in new for unit in part.units}
        left = [part for part in self._parts if part.units & placed]
        for part in new:
            # Nothing is told of it: the plan is in force, and nobody takes this for loading.
            part.cache = self._cache(part.held, self._model, left, lambda _done, _total: None)
        self._parts = [*(part for part in self._parts if part not in left), *new]
        self._places = {unit: part for part in self._parts for unit in part.kv_units}
        self.runner.rearrange(self._parts)
        self._trims = []
        for part in left:
            part.unload()
        return True

    def start_standbys(self, after_s: float = 0.0) -> None:
        """Load or warm what is kept for others and is not ready yet, unless that is under way, and
        then load anew what parts are to be replaced by; what failed before is tried again. Nothing
        is begun before `after_s` seconds have passed."""
        if self._model is None or (self._standbys is not None and not self._standbys.wait(0.0)):
            return
        kept = [part for part in self._parts if not part.units & self._own]
        warm = self._keeps_warm([part for part in kept if part.stage is None])
        waiting = self._waiting(kept, warm=warm)
        idle = self._standbys is None or not all(part.warm for part in waiting.warm)
        if waiting.load or (waiting.warm and idle):
            self.close()
            freed = any(part.stage is not None for part in waiting.warm)
            for part in waiting.warm:
                part.unload()
            if freed and self.runner is not None:
                # It knows what is loaded.
                self.runner.rearrange(self._parts)
            self._standbys = StandbyLoader(
                waiting.load, self._loader(), waiting.warm, self._pages(), after_s=after_s
            )

    def _waiting(self, kept: Sequence[Part], *, warm: bool) -> _Waiting:
        """What is to be loaded or warmed. Those of `kept` that are loaded already stay so, unless
        nothing is to be."""
        trims = [part for part in self._trims if part.stage is None]
        load = [part for part in trims if part.units & self._own]
        others = [part for part in trims if part not in load]
        cold = [part for part in kept if part.stage is None or self._standby == "warm"]
        assert self._model is not None
        coming = [*trims, *cold] if not warm else load
        used = self._used() + sum(
            weight_bytes(self._model, part.held) - part.loaded_bytes for part in coming
        )
        if used > self._room:
            load, others = [], []
        return _Waiting(load, cold + others) if warm else _Waiting(cold + load + others, [])

    def _used(self) -> int:
        """Bytes of weights, KV and inputs that are here."""
        written = self.kv_used_bytes + self.kv_standby_bytes + self.kv_inputs_bytes
        return self.weight_bytes + written

    def _keeps_warm(self, missing: Sequence[Part]) -> bool:
        """Whether parts that are kept for others are not to be loaded, but only warmed."""
        self.standby_reason = ""
        if self._standby != "auto":
            return self._standby == "warm"
        assert self._model is not None
        need = sum(weight_bytes(self._model, part.held) - part.loaded_bytes for part in missing)
        if not need:
            return False
        left = min(self._available(self._device), self._room - self._used())
        if need > left:
            self.standby_reason = (
                f"{max(0, int(left)) // MIB} MiB are left of the memory, and the weights take "
                f"{-(-need // MIB)} MiB"
            )
        return need > left

    def _pages(self) -> Callable[[Holding], Iterator[int]]:
        """What brings the bytes of a holding's weights into the page cache."""
        assert self._folder and self._config and self._model, "who keeps units has a model"
        if self._copies is not None and self._model.quant != "none":
            loader = self._loader()
            return lambda held: loader().prepare(held)
        return PageReader(self._folder, self._config, self._model).read

    def await_standbys(self, timeout: float) -> StandbyReady:
        """Wait until nothing is loading in the background any more, for `timeout` seconds at
        most."""
        if self._standbys is not None:
            self._standbys.wait(timeout)
        return self.standby_ready

    def close(self) -> None:
        """Stop loading in the background. What is loaded stays."""
        if self._standbys is not None:
            self._standbys.stop()
            self._standbys = None

    def recompute(
        self, request_id: int, units: AbstractSet[KvUnit], start: int, end: int
    ) -> Iterator[None]:
        """Write KV of positions `[start, end)` of units that are owned, made of kept inputs.

        Yields several times a second. Raises `LookupError` where the inputs are not here.
        """
        assert self.runner is not None, "units that are owned are held"
        return self.runner.recompute(request_id, units, start, end)

    # --- delta KV ---------------------------------------------------------------------------------

    def read_kv(self, unit: KvUnit, request_id: int, start: int, end: int) -> Tensor:
        """A copy of positions `[start, end)` of a unit: [layers, 2, end - start, head_dim] in the
        KV's number format. They are covered here."""
        part = self._places[unit]
        return part.cache.read(part.kv_units[unit], request_id, start, end)

    def write_kv(self, unit: KvUnit, request_id: int, start: int, tensor: Tensor) -> bool:
        """Write such positions from `start` on; False where the request is not open here, or has
        not so many."""
        part = self._places[unit]
        return part.cache.write(part.kv_units[unit], request_id, start, tensor)
