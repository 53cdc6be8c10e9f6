"""Whatever logs members bring and whatever messages are lost, all begin an epoch alike."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pinfer.core import events as e
from p2pinfer.wire import messages as m
from tests.plan_bench import Holding, Office, log, member

TEXTS = st.text("ab", min_size=1, max_size=5)
LOGS = st.dictionaries(st.integers(1, 3), st.tuples(TEXTS, st.integers(1, 2)), max_size=3)


class Exchange:
    """A leader and its members' plan holders; `drops` says which messages are lost, in turn."""

    def __init__(self, logs: list[dict[int, tuple[str, int]]], drops: list[bool]) -> None:
        self.office = Office(len(logs), term=3)
        self.nodes = {number + 1: Holding(number + 1) for number in range(len(logs))}
        self.logs = {
            number: [log(text, term=term, request_id=i) for i, (text, term) in its.items()]
            for number, its in zip(self.nodes, logs, strict=True)
        }
        self.orders: dict[int, e.ActivatePlan] = {}
        self._drops = drops
        for node in self.nodes.values():
            node.holder.worker_started()

    def pass_on(self) -> None:
        """Deliver what leader and members have sent; what one says to itself is never lost."""
        for kind in (m.Propose, m.LogRequest, m.LogEntry, m.Activate):
            for number, message in self.office.sent(kind):
                if number == 1 or not (self._drops and self._drops.pop()):
                    self._to_member(self.nodes[number], message)
        for number, node in self.nodes.items():
            for kind in (m.Ack, m.LogEntry):
                for _, message in node.sent(kind):
                    if number == 1 or not (self._drops and self._drops.pop()):
                        self._to_leader(number, message)

    def _to_member(self, node: Holding, message: m.ControlMessage) -> None:
        number = int(node.me.node_id, 16)
        match message:
            case m.Propose():
                node.holder.propose(message, "c" * 16, member(1).node_id, node.now)
                for order in node.ordered(e.LoadPlan):
                    node.load(order.plan, *self.logs[number], covered=5)
                node.persist()
            case m.LogRequest():
                node.holder.log_request(message, member(1).node_id)
            case m.LogEntry():
                node.holder.log_entry(message)
            case m.Activate():
                node.holder.activate(message, node.now)
                for done in node.ordered(e.ActivatePlan):
                    self.orders[number] = done
                self.office.maker.obeys(node.me.node_id, node.holder.obeyed)

    def _to_leader(self, number: int, message: m.ControlMessage) -> None:
        if isinstance(message, m.Ack):
            self.office.maker.ack(message, self.office.now)
        elif isinstance(message, m.LogEntry):
            self.office.maker.log_entry(message, member(number).node_id, self.office.now)


@settings(max_examples=50)
@given(st.lists(LOGS, min_size=1, max_size=4), st.lists(st.booleans(), max_size=12))
def test_all_members_begin_with_the_same_logs(
    logs: list[dict[int, tuple[str, int]]], drops: list[bool]
) -> None:
    """Every worker gets the logs that the leader's requests go on from: the highest (term,
    length) of each, with no position before the restart that any owner lacks."""
    exchange = Exchange(logs, drops)
    # Doubts keep the leader from going on to its next plan.
    exchange.office.look()
    for _ in range(60):
        if len(exchange.orders) == len(logs):
            break
        exchange.pass_on()
        exchange.office.look(0.3, suspects=("node9",))
    (agreed, *_) = exchange.office.requests.adopted[0]
    expected = {each.request_id: each.log for each in agreed}
    assert set(exchange.orders) == set(exchange.nodes)
    for order in exchange.orders.values():
        assert {each.request_id: each for each in order.logs} == expected
    best: dict[int, tuple[int, int]] = {}
    for its in logs:
        for request_id, (text, term) in its.items():
            best[request_id] = max(best.get(request_id, (0, 0)), (term, len(text)))
    assert {i: len(each.tokens) for i, each in expected.items()} == {
        i: length for i, (_, length) in best.items()
    }
    for each in agreed:
        for number in exchange.office.owners():
            mine = [o for o in exchange.logs[number] if o.request_id == each.request_id]
            tokens = mine[0].tokens if mine else ()
            assert each.restart < len(each.log.tokens)
            assert tokens[: each.restart] == each.log.tokens[: each.restart]
