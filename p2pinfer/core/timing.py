"""Every timer of the control plane, in seconds, and the formula or reason behind each.

Two presets. `LAN` is for people: the machines of one laboratory, busy with inference. `TEST` is for
tests of whole clusters on one busy machine: the same ratios, made shorter where nothing but waiting
is lost.
"""

from __future__ import annotations

from msgspec import Struct


class Timing(Struct, frozen=True, kw_only=True):
    """Times in seconds. What is said to be random is drawn anew each time, uniformly."""

    heartbeat_every: float = 0.1
    """Between two HEARTBEATs to one member."""

    dead_after: float = 0.7
    """Silence after which a member is dead: 7 * heartbeat_every, so that six may be lost, or a
    machine may stand still for 500 ms. Stretched by local health to at most
    dead_after * (1 + max_health)."""

    max_health: int = 4
    """Lifeguard's S: a node whose own timers fire late doubts itself before it doubts others."""

    late_after: float = 0.05
    """A timer that fires later than this counts against the node's own health."""

    election_min: float = 0.15
    election_max: float = 0.3
    """Between two attempts to be elected, random: several round trips and one write to disk, so
    that most attempts end before the next begins (Raft, section 9.3)."""

    election_first: float = 0.05
    """The first attempt after the leader's proven death, random from 0 to this: several nodes learn
    of a death in the same millisecond, and should not split the vote."""

    resend_every: float = 0.25
    """A PROPOSE, ACTIVATE or LOG_REQUEST without effect is sent again: it was lost with a
    connection, which takes about 50 ms to come back."""

    straggle: float = 1.0
    """How long a plan waits for members that own nothing in it, once all others have answered."""

    settle: float = 0.3
    """How long the membership must be quiet before a plan for more members: 3 * heartbeat_every, so
    that several nodes that start together make one plan."""

    undisturbed: float = 0.3
    """How long replies go on before a plan that can wait interrupts them again: several tokens."""

    undisturbed_max: float = 2.0
    """How long such a plan waits where no token comes: a long prompt is being read."""

    replicas_late: float = 10.0
    """How long replicas that are too many are kept while others are loaded: given up one after the
    other, each would cost a pause."""

    hang_after: float = 0.7
    """A worker that says nothing for so long hangs: as dead_after, for the same reason. Stretched
    to 3 times the longest pause that its steps have shown of late."""

    give_up_hung: float = 60.0
    """A worker that hangs for so long is ended, and its node with it."""

    pair_after: float = 0.5
    """How long one member may say that it does not hear another before the pair counts as broken:
    5 * heartbeat_every, and less than dead_after, since a cut member should be out by then."""

    slow_factor: float = 3.0
    slow_after: float = 10.0
    """A member that computes slow_factor times slower than its share predicts, for slow_after, owns
    nothing for a while."""

    unable_for: float = 10.0
    unable_max: float = 640.0
    """How long a member that could not hold its part is left out: doubling, since each further try
    interrupts the replies, but never for good, since a port may be opened."""

    hello_retry: float = 1.0
    first_word: float = 5.0
    """Patience with a member known from a list only: it may still be starting."""


LAN = Timing()
TEST = Timing(
    settle=0.1,
    straggle=0.5,
    replicas_late=2.0,
    hello_retry=0.25,
    unable_for=1.0,
    unable_max=8.0,
    slow_after=2.0,
    give_up_hung=5.0,
)
PRESETS = {"lan": LAN, "test": TEST}
