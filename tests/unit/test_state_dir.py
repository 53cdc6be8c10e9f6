"""What a node must not forget, on a real disk."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pinfer.core.events import Persisted, PersistFailed, StoredState
from p2pinfer.disk import DiskWriter
from p2pinfer.errors import UsageError
from p2pinfer.state_dir import CLUSTER_FILE, StateDir
from p2pinfer.types import Fence, Member, Plan, Stage
from tests.model_specs import NO_MODEL

CLUSTER = "c" * 16
PLAN = Plan(
    fence=Fence(4, 2),
    cluster_id=CLUSTER,
    leader=0,
    members=(
        Member(node_id="a" * 16, boot_id="b" * 16, name="knöpfle\u2028", address="tcp://h:1"),
    ),
    voters=(0,),
    old_voters=("a" * 16,),
    model=NO_MODEL,
    stages=(Stage(start=0, end=1, head_owners=(0,), mlp_owners=(0,)),),
)
STATE = StoredState(cluster_id=CLUSTER, term=4, voted_for="a" * 16, plan=PLAN, active=True)
WAIT_S = 30.0


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[StateDir]:
    """A state folder in use."""
    with StateDir(tmp_path / "state") as state:
        yield state


class Writer:
    """A DiskWriter, and what it said."""

    def __init__(self, folder: StateDir) -> None:
        self._woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.disk = DiskWriter(folder, lambda: self._woken.put(None))
        self.said: list[Persisted | PersistFailed] = []

    def wait(self) -> Persisted | PersistFailed:
        """The next thing that it says."""
        self._woken.get(timeout=WAIT_S)
        self.said += self.disk.done()
        return self.said[-1]


@pytest.fixture
def writer(folder: StateDir) -> Iterator[Writer]:
    """A writer for the folder."""
    writer = Writer(folder)
    yield writer
    writer.disk.close()


def test_what_was_written_is_read_again(folder: StateDir) -> None:
    """Everything comes back, the plan included; the last write is what counts."""
    assert folder.read() is None
    folder.write(StoredState(cluster_id=CLUSTER, blank=True))
    assert folder.read() == StoredState(cluster_id=CLUSTER, blank=True)
    folder.write(STATE)
    assert folder.read() == STATE
    assert {file.name for file in folder.path.iterdir()} == {"node_id", CLUSTER_FILE}


def test_what_was_forgotten_is_gone(folder: StateDir) -> None:
    """Nothing is left to be read; forgetting twice is no error."""
    folder.write(STATE)
    folder.forget()
    folder.forget()
    assert folder.read() is None


def test_an_interrupted_write_leaves_the_state_before(folder: StateDir) -> None:
    """The half of a new file beside it is neither read nor in the way of the next write."""
    folder.write(STATE)
    (folder.path / CLUSTER_FILE).with_suffix(".new").write_bytes(b"{half")
    assert folder.read() == STATE
    folder.write(StoredState(cluster_id=CLUSTER))
    assert folder.read() == StoredState(cluster_id=CLUSTER)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "no checksum"])
def test_a_damaged_file_is_told_with_what_to_do(folder: StateDir, damage: str) -> None:
    """A node must not start with half of its promises."""
    folder.write(STATE)
    file = folder.path / CLUSTER_FILE
    content = file.read_bytes()
    flipped = content.replace(b'"term":4', b'"term":5', 1)
    damaged = {
        "cut": content[:-20],
        "flipped": flipped,
        "empty": b"",
        "no checksum": content.partition(b"\n")[0],
    }
    file.write_bytes(damaged[damage])
    with pytest.raises(UsageError, match=r"is damaged: its checksum does not match; .*or remove"):
        folder.read()


def test_a_file_that_is_no_state_is_told(folder: StateDir) -> None:
    """A checksum that matches does not make a state of what is none."""
    folder.write(STATE)
    file = folder.path / CLUSTER_FILE
    checksum = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # of {}
    file.write_text("{}\n" + checksum + "\n")
    with pytest.raises(UsageError, match=r"is damaged: .*cluster_id"):
        folder.read()


def test_a_file_that_cannot_be_read_is_told(folder: StateDir) -> None:
    """It is not taken for no state: the node would vote twice."""
    (folder.path / CLUSTER_FILE).mkdir()
    with pytest.raises(UsageError, match="cannot be read"):
        folder.read()


def test_the_writer_says_when_a_state_is_on_the_disk(folder: StateDir, writer: Writer) -> None:
    """A state, and its removal, are told by their numbers."""
    writer.disk.write(1, STATE)
    assert writer.wait() == Persisted(number=1)
    assert folder.read() == STATE
    writer.disk.write(2, None)
    assert writer.wait() == Persisted(number=2)
    assert folder.read() is None


def test_the_writer_comes_to_the_newest(folder: StateDir, writer: Writer) -> None:
    """Of many that wait it may leave out all but the last, which it says; numbers only grow."""
    states = [StoredState(cluster_id=CLUSTER, term=number) for number in range(50)]
    for number, state in enumerate(states):
        writer.disk.write(number, state)
    while writer.wait() != Persisted(number=49):
        pass
    numbers = [each.number for each in writer.said if isinstance(each, Persisted)]
    assert numbers == sorted(set(numbers))
    assert folder.read() == states[-1]


def test_the_writer_finishes_what_waits_when_it_is_closed(folder: StateDir) -> None:
    """A node that leaves for good has forgotten when its process ends; closing twice is safe."""
    folder.write(STATE)
    disk = DiskWriter(folder, lambda: None)
    disk.write(1, STATE)
    disk.write(2, None)
    disk.close()
    disk.close()
    assert folder.read() is None
    assert disk.done()[-1] == Persisted(number=2)


def test_a_disk_that_takes_nothing_is_told(folder: StateDir, writer: Writer) -> None:
    """The reason is given; the state before is still there, and the next write may succeed."""
    folder.write(STATE)
    obstacle = (folder.path / CLUSTER_FILE).with_suffix(".new")
    obstacle.mkdir()
    writer.disk.write(1, StoredState(cluster_id=CLUSTER))
    failed = writer.wait()
    assert isinstance(failed, PersistFailed) and "cluster.new" in failed.reason
    assert folder.read() == STATE
    obstacle.rmdir()
    writer.disk.write(2, StoredState(cluster_id=CLUSTER))
    assert writer.wait() == Persisted(number=2)


def test_a_read_only_folder_is_told(folder: StateDir) -> None:
    """Neither writing nor forgetting passes for done."""
    gone = folder.path.with_name("gone")
    folder.path.rename(gone)
    writer = Writer(folder)
    for number, state in ((1, STATE), (2, None)):
        writer.disk.write(number, state)
        assert isinstance(writer.wait(), PersistFailed)
    writer.disk.close()
