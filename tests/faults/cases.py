"""What befalls nodes of a true cluster, as data: which fault, on whom, at which moment.

`bin/kills` plays these one after the other; `bin/soak` draws from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tests.faults.watching import GO_ON_S

Fault = Literal[
    "kill",  # SIGKILL of the control process; its worker ends with it
    "stop",  # SIGSTOP of the whole node, then SIGCONT
    "hang",  # SIGSTOP of its worker alone
    "freeze",  # SIGSTOP of its control process alone
    "cut",  # it reaches nobody and nobody reaches it, and nobody is told
    "one-way",  # nothing that it sends to one other arrives
    "delay",  # all between it and the others is late
    "loss",  # some of it is late by TCP's retransmission time-outs
    "reset",  # all connections with one other are reset
    "disk-full",  # its disk takes nothing more: it ends by itself at the next plan
    "move",  # it is killed, and comes back at another address
    "nothing",  # a node comes or goes, and nobody is struck
]
Role = Literal["follower", "leader"]
Moment = Literal["decode", "prefill", "failover", "join", "drain"]
Network = Literal["direct", "proxy", "namespaces"]

Rungs = frozenset[str]
ONE_LOST: Rungs = frozenset({"replica", "none"})
NONE_LOST: Rungs = frozenset({"none"})
MANY_LOST: Rungs = frozenset({"replica", "replay", "none"})
"""Of two nodes that die together, one may have had the only replica of what the other owned."""

WITHOUT_REPLICAS: Rungs = frozenset({"replay", "none"})
"""Of a cluster that keeps none, but where a node comes or goes: the KV of the units that then move
is copied first."""


@dataclass(frozen=True)
class Case:
    """One kind of fault. `struck` are the roles of those whom it befalls, all at once.

    `serving`: the replies come through the first of those struck, or through one of the rest.
    `before` is whom the moment is about: who is killed first (`failover`), who joins (`join`), who
    is drained (`drain`); it may itself be struck (`struck` is then empty), or nobody (`nothing`).
    `rungs`: the ways in which KV may come back. `lost`: those struck own nothing in the plan that
    follows; otherwise the fault holds for `held_s`. `quorum`: the rest can go on without them;
    otherwise they are started again at once. `targets` are what 99 of 100 are to keep, in seconds.
    """

    name: str
    fault: Fault
    struck: tuple[Role, ...] = ("follower",)
    moment: Moment = "decode"
    before: Role | None = None
    serving: Literal["rest", "struck"] = "rest"
    network: Network = "direct"
    rungs: Rungs = ONE_LOST
    lost: bool = True
    held_s: float = 0.0
    quorum: bool = True
    nodes: int = 4
    targets: Mapping[str, float] = field(default_factory=dict)

    def possible_rungs(self, replicas: int, *, keep_inputs: bool) -> Rungs:
        """The ways in which KV may come back where so many replicas are kept, or inputs."""
        moves = self.moment in ("join", "drain")
        found = self.rungs if replicas or moves else WITHOUT_REPLICAS
        return found | {"recompute"} if keep_inputs and "replay" in found else found


_KILLED = {"suspected_s": 0.1, "adopted_s": 0.3, "pause_s": GO_ON_S}
_LEADER = _KILLED | {"adopted_s": 0.8}
_SILENT = {"noticed_s": 1.0, "pause_s": GO_ON_S}
_PAUSE = {"pause_s": GO_ON_S}

CASES: tuple[Case, ...] = (
    # --- one node is killed -----------------------------------------------------------------------
    Case("follower", "kill", targets=_KILLED),
    Case("leader", "kill", ("leader",), targets=_LEADER),
    Case("serving-follower", "kill", serving="struck", targets=_KILLED),
    Case("serving-leader", "kill", ("leader",), serving="struck", targets=_LEADER),
    Case("follower-prefill", "kill", moment="prefill", rungs=MANY_LOST),
    Case("leader-prefill", "kill", ("leader",), moment="prefill", rungs=MANY_LOST),
    Case("serving-prefill", "kill", moment="prefill", serving="struck", rungs=MANY_LOST),
    # --- two nodes --------------------------------------------------------------------------------
    Case("two-followers", "kill", ("follower", "follower"), rungs=MANY_LOST, targets=_PAUSE),
    Case("two-of-five", "kill", ("leader", "follower"), rungs=MANY_LOST, nodes=5, targets=_PAUSE),
    Case("leader-and-follower", "kill", ("leader", "follower"), rungs=MANY_LOST, quorum=False),
    Case("failover-follower", "kill", moment="failover", before="follower", rungs=MANY_LOST),
    Case(
        *("failover-leader", "kill", ("leader",), "failover", "follower"),
        rungs=MANY_LOST,
        quorum=False,
    ),
    Case(
        *("failover-new-leader", "kill", ("leader",), "failover", "leader"),
        rungs=MANY_LOST,
        quorum=False,
    ),
    # --- while a node comes or goes ---------------------------------------------------------------
    Case("join-follower", "kill", moment="join", before="follower", rungs=MANY_LOST),
    Case("join-leader", "kill", ("leader",), "join", "follower", rungs=MANY_LOST),
    Case("join-joiner", "kill", (), "join", "follower", rungs=MANY_LOST),
    Case("drain-follower", "kill", moment="drain", before="follower", rungs=MANY_LOST),
    Case("drain-leader", "kill", ("leader",), "drain", "follower", rungs=MANY_LOST),
    Case("drain-drained", "kill", (), "drain", "follower", rungs=MANY_LOST),
    Case("join", "nothing", (), "join", "follower", lost=False),
    Case("drain", "nothing", (), "drain", "follower", lost=False),
    Case("drain-the-leader", "nothing", (), "drain", "leader", lost=False),
    # --- a node stands still ----------------------------------------------------------------------
    Case("stop-follower", "stop", targets=_SILENT),
    Case("stop-leader", "stop", ("leader",), targets=_SILENT),
    Case("stop-serving", "stop", serving="struck", targets={"noticed_s": 1.0}),
    Case("hang-follower", "hang", targets=_SILENT),
    Case("hang-leader", "hang", ("leader",), targets=_SILENT),
    Case("freeze-follower", "freeze", targets=_SILENT),
    Case("freeze-leader", "freeze", ("leader",), targets=_SILENT),
    # --- the network ------------------------------------------------------------------------------
    Case("cut-follower", "cut", network="namespaces", targets=_SILENT),
    Case("cut-leader", "cut", ("leader",), network="namespaces", targets=_SILENT),
    Case("one-way-follower", "one-way", network="proxy", lost=False, held_s=3.0),
    Case("one-way-leader", "one-way", ("leader",), network="proxy", lost=False, held_s=3.0),
    Case("delay", "delay", network="proxy", lost=False, held_s=2.0),
    Case("loss", "loss", network="proxy", lost=False, held_s=3.0),
    Case("reset-follower", "reset", network="proxy", lost=False, held_s=0.5, targets=_PAUSE),
    Case(
        *("reset-leader", "reset", ("leader",)),
        network="proxy",
        lost=False,
        held_s=0.5,
        targets=_PAUSE,
    ),
    # --- the disk, the address --------------------------------------------------------------------
    Case("disk-full", "disk-full", moment="failover", before="follower", rungs=MANY_LOST),
    Case("move-follower", "move", targets=_KILLED),
    Case("move-leader", "move", ("leader",), targets=_LEADER),
)
BY_NAME: Mapping[str, Case] = {case.name: case for case in CASES}
