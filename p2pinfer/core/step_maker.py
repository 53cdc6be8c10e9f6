"""The leader's part in the steps of one fence, without the computing: what to send and to report.

It joins the scheduler (what a step computes) with the commits (what may leave to clients). Its
caller writes the steps in its own log, sends them to the listeners, computes, and draws.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from p2pinfer.core.blocks import BLOCK_POSITIONS, BlockPool
from p2pinfer.core.commits import Commits
from p2pinfer.core.orders import FenceSettled, RequestEnded, StartRequest, TokenLog, TokensCommitted
from p2pinfer.core.scheduler import EndedReply, Piece, Scheduler, Work
from p2pinfer.core.topology import Topology, position_limit
from p2pinfer.errors import ClusterError
from p2pinfer.limits import MAX_STEP_SLOTS
from p2pinfer.wire.messages import DrawnToken, Step

StepReport = FenceSettled | TokensCommitted | RequestEnded


class StepMaker:
    """Makes the steps of a plan in force, and says what is committed.

    `listeners` are the members (indices) that steps go to; `logs` those that the plan was activated
    with. Steps are numbered from 1; a step must be `finished` before the next is made.
    """

    def __init__(
        self,
        topology: Topology,
        listeners: Iterable[int],
        logs: Iterable[TokenLog],
        max_step_tokens: int = 256,
    ) -> None:
        plan = topology.plan
        logged = [log.request_id for log in logs]
        self.scheduler = Scheduler(
            pool=BlockPool(max(1, position_limit(plan) // BLOCK_POSITIONS)),
            max_positions=plan.model.max_positions,
            eos_token_ids=frozenset(plan.model.eos_token_ids),
            logged=logged,
            max_step_tokens=max_step_tokens,
        )
        self.commits: Commits[Piece] = Commits(plan, listeners, topology.me)
        self._fence = plan.fence
        self._step = 0
        self._news: tuple[Piece, ...] = ()
        self._unsettled = bool(logged)
        self._settled = False
        self._sent_at: deque[tuple[int, float]] = deque()

    # --- requests ---------------------------------------------------------------------------------

    def start(self, order: StartRequest) -> list[StepReport]:
        """Enter a request. Returns its end where it can never be computed."""
        try:
            self.scheduler.add(
                order.request_id, order.prompt_ids, order.received, order.params, order.computed
            )
        except ClusterError as error:
            self.scheduler.cancel(order.request_id)
            ended = RequestEnded(
                fence=self._fence,
                request_id=order.request_id,
                reason="error",
                total_tokens=0,
                code=error.code,
                message=error.message,
            )
            return [ended]
        return []

    def cancel(self, request_id: int) -> None:
        """End a request: nothing that it drew and that is not committed will be told."""
        self.scheduler.cancel(request_id)
        self.commits.forget(request_id)

    # --- steps ------------------------------------------------------------------------------------

    def next_step(self) -> Step | None:
        """The next step (as to myself: number 0 on the link); None when nothing needs one.

        A step without slots says what is over, or only asks whether the logs are with everybody.
        """
        work = self.scheduler.next_step()
        if work is None:
            if not self._unsettled:
                return None
            work = Work()
        self._unsettled = False
        return self._made(work)

    def last_words(self) -> Step | None:
        """A step that only tells what the one before drew; None when there was nothing drawn.

        Should steps go on all the same, the next one computes what it told.
        """
        work = self.scheduler.last_words()
        return None if work is None else self._made(work)

    def _made(self, work: Work) -> Step:
        self._step += 1
        self._news = work.news
        return Step(
            fence=self._fence,
            step=self._step,
            link_seq=0,
            slots=work.slots,
            ended=work.ended,
            finals=work.finals,
        )

    def sent(self, now: float) -> list[StepReport]:
        """The step just made is on its way to all listeners, and in my own log."""
        self._sent_at.append((self._step, now))
        return self._told(self.commits.announced(self._step, self._news))

    def acked(self, member: int, step: int) -> list[StepReport]:
        """A member has all up to `step` in its log. Raises `RemoteProtocolError` for a lie."""
        return self._told(self.commits.acked(member, step))

    def finished(self, step: Step, drawn: Mapping[int, int], seconds: float) -> None:
        """A step took so many `seconds`; `drawn` has a token for each slot that samples."""
        self.scheduler.finish_step(step.slots, drawn, seconds)

    def overdue(self, now: float, limit: float) -> int | None:
        """The member whose acknowledgement is awaited for more than `limit` seconds, if any is."""
        if not self._sent_at or now - self._sent_at[0][1] <= limit:
            return None
        return self.commits.missing()

    def _told(self, news: list[Piece]) -> list[StepReport]:
        """What the worker reports now that `news` are committed."""
        while self._sent_at and self._sent_at[0][0] <= self.commits.step:
            self._sent_at.popleft()
        reports: list[StepReport] = []
        if self.commits.step and not self._settled:
            self._settled = True
            reports.append(FenceSettled(fence=self._fence))
        tokens = [piece for piece in news if isinstance(piece, DrawnToken)]
        for start in range(0, len(tokens), MAX_STEP_SLOTS):
            some = tuple(tokens[start : start + MAX_STEP_SLOTS])
            reports.append(TokensCommitted(fence=self._fence, tokens=some))
        for piece in news:
            if isinstance(piece, EndedReply):
                self.scheduler.committed(piece.request_id)
                reports.append(
                    RequestEnded(
                        fence=self._fence,
                        request_id=piece.request_id,
                        reason=piece.reason,
                        total_tokens=piece.total_tokens,
                    )
                )
        return reports
