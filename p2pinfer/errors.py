"""The whole error tree, ordered by who must act.

`UsageError`: the person at this machine (exit code 2). `RemoteProtocolError`: the peer that sent
the bytes. `StepBroken`: the leader, by a new epoch. `ClusterError`: the cluster's operator or a
later retry (exit code 1); its `code` is one of the error codes of `proto_spec.md` and `retryable`
says whether the same call may succeed later.
"""

from __future__ import annotations


class P2pinferError(Exception):
    """Anything that p2pinfer raises on purpose; the message says what is wrong and what to do."""


class UsageError(P2pinferError):
    """A flag, a folder or a file of this machine is wrong. The person who started us must act."""


class ModelError(UsageError):
    """The model's folder is missing, damaged, or of a kind that p2pinfer does not compute."""


class LocalProtocolError(P2pinferError):
    """This program tried to send what the protocol forbids: a defect of ours."""


class RemoteProtocolError(P2pinferError):
    """A peer sent bytes that are no message of this protocol. The frame is dropped and counted."""


class StepBroken(P2pinferError):
    """A step cannot be finished: a new epoch is the cure. `node_id` is the member at fault.

    `broken`: it computed what is no number.
    """

    def __init__(self, node_id: str, reason: str, *, broken: bool = False) -> None:
        super().__init__(f"{reason} (member {node_id})")
        self.node_id = node_id
        self.reason = reason
        self.broken = broken


class LinkBroken(StepBroken):
    """The step link to or from the member may have lost frames."""


class StepOverdue(StepBroken):
    """The member owes its part for longer than any step should take."""


class ClusterError(P2pinferError):
    """The cluster could not do what was asked; carries a code of `proto_spec.md`."""

    def __init__(self, code: str, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable


class InvalidRequestError(ClusterError):
    """The request itself is wrong (empty prompt, impossible sampling value): change it."""

    def __init__(self, message: str, code: str = "invalid_request") -> None:
        super().__init__(code, message, retryable=False)


ERROR_CODES: dict[str, bool] = {
    "invalid_request": False,
    "empty_prompt": False,
    "prompt_too_long": False,
    "overloaded": True,
    "not_ready": True,
    "no_quorum": True,
    "node_lost": True,
    "leader_lost": True,
    "leaving": True,
    "cancelled": False,
    "log_conflict": False,
    "internal": True,
    "wrong_version": False,
    "wrong_model": False,
    "wrong_settings": False,
    "wrong_cluster": False,
    "identity_taken": False,
    "name_taken": False,
    "cluster_full": True,
    "not_a_member": True,
}
"""Every error code of `proto_spec.md`, and whether the same call may succeed later."""
