"""The outcome of a run: what each event of its server means for it, and whether it produced an update."""

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from fedbus.contracts.run import RUN, RunEvent, RunState
from fedbus.contracts.server import ServerEvent
from fedbus.contracts.situations import ServerTraining

RunOutcome: TypeAlias = Literal["finished", "failed", "cancelled"]

MAX_NAMED_FAILURES: Final = 20
"""Failed clients that a reason names. All of them are in the result of the round."""

RUN_EVENTS: Final[Mapping[str, RunEvent]] = {
    ServerEvent.RUN_REQUESTED: RunEvent.RECRUITING_STARTED,
    ServerEvent.QUORUM_REACHED: RunEvent.QUORUM_REACHED,
    ServerEvent.RECRUITING_EXPIRED: RunEvent.RECRUITING_EXPIRED,
    ServerEvent.ROUND_FINISHED: RunEvent.ROUND_FINISHED,
    ServerEvent.SERVER_LOST: RunEvent.SERVER_LOST,
    ServerEvent.SERVER_RECOVERED: RunEvent.SERVER_RECOVERED,
    ServerEvent.RUN_FAILED: RunEvent.RUN_FAILED,
    ServerEvent.RUN_CANCELLED: RunEvent.CANCELLED,
    ServerEvent.VERSION_PUBLISHED: RunEvent.RUN_FINISHED,
    ServerEvent.CANDIDATE_KEPT: RunEvent.RUN_FINISHED,
    ServerEvent.VERSION_REFUSED: RunEvent.RUN_FAILED,
}
"""The event of a run for each event of its server. Other events of the server do not concern the run."""

_FINAL_STATES: Final = {event: target for (_, event), target in RUN.arrows.items() if target in RUN.final}


def run_outcome(event: str) -> RunOutcome | None:
    """Return the outcome of the run that the server's *event* ends; None if *event* does not end a run."""
    run_event = RUN_EVENTS.get(event)
    match _FINAL_STATES.get(run_event) if run_event is not None else None:
        case RunState.FINISHED:
            return "finished"
        case RunState.FAILED:
            return "failed"
        case RunState.CANCELLED:
            return "cancelled"
        case _:
            return None


def no_update_reason(run: ServerTraining) -> str:
    """Return why the run produced no update: every training failed. Empty if a training succeeded.

    A strategy may continue after a round without updates, with an unchanged model. An app that reports no
    rounds counts as successful.
    """
    if not run.trainings or run.failures < run.trainings:
        return ""
    last = sorted(run.last.failures.items()) if run.last else []
    named = [f"{client}: {why}" for client, why in last[:MAX_NAMED_FAILURES]]
    if (count := len(last) - MAX_NAMED_FAILURES) > 0:
        named.append(f"{count} more failed")
    reasons = "; ".join(named)
    failed = f"no client's update is in any of the {run.round} rounds"
    return f"{failed}; in the last one {reasons}" if reasons else failed
