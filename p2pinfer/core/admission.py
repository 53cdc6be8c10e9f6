"""Who may become a member: the check of a HELLO, as an ordered list of reasons to refuse.

Every refusal names both values, ours and theirs, so that either side's log tells what to mend.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from p2pinfer.limits import MAX_NODES
from p2pinfer.types import Member, ModelSpec
from p2pinfer.wire.codec import VERSIONS
from p2pinfer.wire.messages import Hello, Refused


@dataclass(frozen=True, slots=True)
class Gate:
    """What the asked node is and knows: its own member, cluster ("" while joining), living peers.

    `model` is None for a witness, which leaves the judgement of models to the others. `heard` are
    the node ids of the peers that are there for sure (`Neighbours.sure_ids`).
    """

    me: Member
    model: ModelSpec | None
    cluster_id: str
    peers: Iterable[Member]
    heard: Collection[str] = ()


def make_hello(me: Member, model: ModelSpec | None, cluster_id: str, layout: str) -> Hello:
    """The HELLO of a node; a witness holds no model and says so by empty names."""
    return Hello(
        versions=VERSIONS,
        member=me,
        cluster_id=cluster_id,
        model_id=model.model_id if model else "",
        dtype=model.dtype.value if model else "",
        quant=model.quant if model else "",
        wire_dtype=model.wire_dtype if model else "",
        layout=layout,
    )


def common_version(versions: Iterable[int]) -> int:
    """The highest version that both sides speak, or 0."""
    return max(set(versions) & set(VERSIONS), default=0)


def check_hello(hello: Hello, gate: Gate) -> Refused | None:
    """None when the sender may come in, otherwise the first reason why not."""
    for rule in _RULES:
        if refused := rule(hello, gate):
            return refused
    return None


def _version(hello: Hello, gate: Gate) -> Refused | None:
    if common_version(hello.versions):
        return None
    ours, theirs = _listed(VERSIONS), _listed(hello.versions)
    return Refused(
        code="wrong_version",
        message=f"{gate.me.name} speaks protocol version {ours}, {hello.member.name} {theirs}; "
        f"install the same release of p2pinfer on both",
    )


def _identity(hello: Hello, gate: Gate) -> Refused | None:
    if hello.member.node_id != gate.me.node_id:
        return None
    return Refused(
        code="identity_taken",
        message=f"{gate.me.name} has the node id {gate.me.node_id} itself; if you are another "
        f"node, give it a state directory of its own",
    )


def _twin(hello: Hello, gate: Gate) -> Refused | None:
    """A second process with the identity of one that is there, a copied state folder say.

    At the same address it must be the same node, started again: two cannot listen there. And one
    whose former process is not heard just now, or whose connection broke, is taken to have been
    started again elsewhere.
    """
    theirs = hello.member
    for peer in gate.peers:
        if (
            peer.node_id == theirs.node_id
            and peer.boot_id != theirs.boot_id
            and peer.address != theirs.address
            and peer.node_id in gate.heard
        ):
            return Refused(
                code="identity_taken",
                message=f"node id {theirs.node_id} belongs to {peer.name} (pid {peer.pid}), which "
                f"runs at {peer.address}; {theirs.name} at {theirs.address} must have a state "
                f"directory of its own, or that process must end first",
            )
    return None


def _settled(hello: Hello, gate: Gate) -> Refused | None:
    if gate.cluster_id:
        return None
    return Refused(
        code="not_ready",
        message=f"{gate.me.name} is itself still looking for a cluster to join",
        retryable=True,
    )


def _model(hello: Hello, gate: Gate) -> Refused | None:
    if gate.model is None or (hello.member.witness and not hello.model_id):
        return None
    if hello.model_id == gate.model.model_id:
        return None
    offered = f"id {_short(hello.model_id)}" if hello.model_id else "none"
    return Refused(
        code="wrong_model",
        message=f"this cluster serves model {gate.model.name} (id {_short(gate.model.model_id)}); "
        f"{hello.member.name} offered model {offered}: its weights, config or tokenizer differ",
    )


def _settings(hello: Hello, gate: Gate) -> Refused | None:
    if gate.model is None or not hello.model_id:
        return None
    ours = _number_format(gate.model.dtype.value, gate.model.quant, gate.model.wire_dtype)
    theirs = _number_format(hello.dtype, hello.quant, hello.wire_dtype)
    if ours == theirs:
        return None
    return Refused(
        code="wrong_settings",
        message=f"this cluster serves model {gate.model.name} (id {_short(gate.model.model_id)}) "
        f"as {ours}; {hello.member.name} offered {theirs}: start it with the same --dtype, "
        f"--quant and --wire-dtype",
    )


def _number_format(dtype: str, quant: str, wire_dtype: str) -> str:
    return f"{dtype}, quantisation {quant}, sums in {wire_dtype}"


def _cluster(hello: Hello, gate: Gate) -> Refused | None:
    if hello.cluster_id in ("", gate.cluster_id):
        return None
    return Refused(
        code="wrong_cluster",
        message=f"{gate.me.name} is in cluster {gate.cluster_id}, {hello.member.name} in "
        f"{hello.cluster_id}; stop one of the clusters and let its nodes join the other",
    )


def _name(hello: Hello, gate: Gate) -> Refused | None:
    for other in (gate.me, *gate.peers):
        if other.name == hello.member.name and other.node_id != hello.member.node_id:
            return Refused(
                code="name_taken",
                message=f"the name {other.name} belongs to node {other.node_id} at "
                f"{other.address}; {hello.member.node_id} must take another with --name",
            )
    return None


def _room(hello: Hello, gate: Gate) -> Refused | None:
    others = [peer for peer in gate.peers if peer.node_id != hello.member.node_id]
    if len(others) + 2 <= MAX_NODES:
        return None
    return Refused(
        code="cluster_full",
        message=f"this cluster has {len(others) + 1} members and may have {MAX_NODES}: there is "
        f"no room for {hello.member.name} until one leaves",
        retryable=True,
    )


_RULES: tuple[Callable[[Hello, Gate], Refused | None], ...] = (
    _version,
    _identity,
    _twin,
    _settled,
    _model,
    _settings,
    _cluster,
    _name,
    _room,
)


def _short(digest: str) -> str:
    return digest[:12] + "…" if digest else "none"


def _listed(versions: Iterable[int]) -> str:
    return ", ".join(map(str, versions))
