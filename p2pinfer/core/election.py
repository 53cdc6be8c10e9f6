"""Who leads, and in which term.

The rule in force: the node that founded the cluster leads it, in term 1, for as long as it lives.
The interface is that of Raft's election (Ongaro and Ousterhout, 2014; pre-vote from section 9.6 of
Ongaro's thesis), which takes the same inputs: messages, the loss of a node, and the time.
"""

from __future__ import annotations

from math import inf

from p2pinfer.core.events import Fact, FrameDropped
from p2pinfer.wire.messages import (
    ControlMessage,
    Heartbeat,
    PreVoteReply,
    PreVoteRequest,
    VoteReply,
    VoteRequest,
)

ElectionMessage = PreVoteRequest | PreVoteReply | VoteRequest | VoteReply
FOUNDING_TERM = 1


class Election:
    """One node's view of the leadership. `leader_id` is empty while nobody is known to lead."""

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self.leader_id = ""
        self.term = 0

    @property
    def leads(self) -> bool:
        """Whether this node is the leader."""
        return self.leader_id == self._node_id

    @property
    def deadline(self) -> float:
        """When the election next wants to see the time, in seconds."""
        return inf

    def found(self) -> None:
        """This node founds a cluster, and so leads it."""
        self.follow(self._node_id, FOUNDING_TERM)

    def follow(self, leader_id: str, term: int) -> None:
        """`leader_id` leads in `term` (0: not known yet)."""
        self.leader_id, self.term = leader_id, term

    def node_lost(self, node_id: str) -> bool:
        """A member died or left; true when that leaves the cluster without its leader."""
        return node_id == self.leader_id

    def forget(self) -> None:
        """The cluster is gone for this node: nobody leads."""
        self.follow("", 0)

    def handle(self, message: ControlMessage, sender: str, now: float) -> list[Fact]:
        """A heartbeat tells the leader's term; a vote has no use under the founder's rule."""
        if isinstance(message, Heartbeat):
            if sender == self.leader_id:
                self.term = message.term
            return []
        return [FrameDropped(reason=f"{type(message).__name__}: this cluster holds no elections")]
