"""Plans that know how fast the nodes are: unequal shares, and nodes that are left out."""

from __future__ import annotations

from typing import Any

from p2pinfer.client import Client
from p2pinfer.cluster import LocalCluster, LocalNode, free_base_port
from p2pinfer.types import SamplingParams
from tests.faults.watching import until
from tests.processes.command_line import finish, start_cli


class Unequal(LocalCluster):
    """A cluster whose last node is as slow as `slow` says, in GB/s."""

    slow = ""

    def start_node(self, index: int, **changes: Any) -> LocalNode:
        """As any other node, but for its speed."""
        if index == self._count - 1:
            changes["speed"] = self.slow
        return super().start_node(index, **changes)


def unequal(slow: str, **options: Any) -> Unequal:
    """Three nodes of 0.2 GB/s, the last of which is slower; not started yet."""
    settings = {"speed": "0.2", "timing": "test", **options}
    cluster = Unequal(3, base_port=free_base_port(3), threads=1, options=settings)
    cluster.slow = slow
    return cluster


def mlp_units(plan: dict[str, Any]) -> list[int]:
    """How many MLP units each member owns."""
    return [sum(len(part["mlp_units"]) for part in m["owned"]) for m in plan["members"]]


def reply(client: Client) -> list[int]:
    """A greedy reply of a few tokens."""
    found = client.submit_json_object("Once upon a time", SamplingParams(max_tokens=12))
    assert found["error"] is None, found
    tokens: list[int] = found["token_ids"]
    return tokens


def test_a_slow_node_gets_less() -> None:
    """Without `--weight` units are shared out by speed, and `plan` says how fast that is to be."""
    with unequal("0.1", use_nodes="all") as cluster:
        client = Client([cluster.nodes[0].address])
        plan = client.plan()
        first, second, slow = mlp_units(plan)
        assert 0 < slow < min(first, second)
        assert [member["product_gb_s"] for member in plan["members"]] == [0.2, 0.2, 0.1]
        assert plan["prediction"]["nodes"] == plan["prediction"]["of"] == 3
        assert plan["prediction"]["tokens_per_s"] > 10


def test_a_node_that_makes_the_whole_slower_owns_nothing() -> None:
    """Where the shares are told, and one node is too slow for its own, the others are faster alone;
    it comes in when there are not enough of them."""
    with unequal("0.01", use_nodes="auto", weight=1.0) as cluster:
        addresses = [node.address for node in cluster.nodes]
        client = Client(addresses)
        until(lambda: mlp_units(client.plan())[2] == 0, what="node3 to be left out")
        found = client.plan()["prediction"]
        assert (found["nodes"], found["of"], found["left_out"]) == (2, 3, ["node3"])
        (slower,) = (other for other in found["alternatives"] if other["nodes"] == 3)
        assert slower["tokens_per_s"] * 1.15 < found["tokens_per_s"]
        code, shown, _ = finish(start_cli("plan", "--to", addresses[0], COLUMNS="160"))
        assert code == 0
        assert f"2 of 3 nodes: {found['tokens_per_s']:.3g} tok/s predicted; 3: " in shown
        assert "(owning nothing: node3)" in shown
        assert client.plan("node2")["plan"]["prediction"]["nodes"] == 1
        before = reply(client)
        for node in cluster.nodes[:2]:
            client.pause(node.name)
        until(lambda: mlp_units(client.plan()) == [0, 0, 8], what="node3 to own all")
        assert reply(client) == before
