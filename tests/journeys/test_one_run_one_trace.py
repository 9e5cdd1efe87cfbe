"""A run is one trace: from the trigger over the server and each client's training to each client's new model."""

from collections import Counter

import pytest
from opentelemetry import trace
from support import eventually
from support.collector import Span
from support.federation import TASK, Federation
from support.traces import Heard, listening
from support.whole import ended, start_run, whole

CLIENTS = ("c1", "c2")


async def test_two_runs_are_two_traces_and_each_tells_all_that_happened_in_it(
    fed: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with listening(monkeypatch) as heard:
        async with whole(fed, clients=len(CLIENTS)):
            roots = [await traced_run(fed) for _ in range(2)]
        await eventually(lambda: all(not orphans(heard.of(root)) for root in roots))

    assert roots == [fed.run(number).trace_id for number in (1, 2)]
    assert len(set(roots)) == 2
    for number, root in enumerate(roots, start=1):
        tells_all(heard, root, f"{TASK}-{number}")


async def traced_run(fed: Federation) -> str:
    """A run that a person starts and sees to its end; the trace that begins with it."""
    with trace.get_tracer("test").start_as_current_span("a person starts a run") as root:
        run = await start_run(fed, quorum=len(CLIENTS))
    await ended(fed, run)
    return f"{root.get_span_context().trace_id:032x}"


def orphans(spans: list[Span]) -> list[str]:
    """Spans whose parent nobody has sent."""
    known = {span.span_id for span in spans}
    return [span.name for span in spans if span.parent_id and span.parent_id not in known]


def tells_all(heard: Heard, trace_id: str, run: str) -> None:
    spans = heard.of(trace_id)
    assert [span.name for span in spans if not span.parent_id] == ["a person starts a run"]

    moves = Counter(span.name for span in spans if "→" in span.name)
    each = len(CLIENTS)
    assert moves == {
        "run • → requested": 1,
        "run requested → recruiting": 1,
        "run recruiting → running": 1,
        "run running → running": 3,  # the model it began with, and two rounds
        "run running → finished": 1,
        "server waiting → recruiting": 1,
        "server recruiting → training": 1,
        "server training → training": 3,
        "server training → publishing": 1,
        "server publishing → waiting": 1,
        "client serving → learning": each,
        "client learning → pending_application": each,
        "client pending_application → serving": each,
        "fl_client waiting → pending": each,
        "fl_client pending → training": each,
        "fl_client training → finished": each,
        "fl_client finished → waiting": each,
        "inference serving → updating": each,
        "inference updating → serving": each,
    }
    assert {span.attributes["fedbus.run"] for span in spans if span.name.startswith("run ")} >= {run}

    names = Counter(span.name for span in heard.children.spans if span.trace_id == trace_id)
    assert names["run the ServerApp"] == 1
    for phase in ("download", "train", "upload"):
        assert names[phase] >= 2 * each, f"each client's {phase} in each round"
    hangs_together(spans)


def hangs_together(spans: list[Span]) -> None:
    """Each client's training hangs on the message that asked for it, and all of it on who began it."""
    by_id = {span.span_id: span for span in spans}
    for training in (span for span in spans if span.name == "train"):
        above = ancestry(training, by_id)
        assert above[:3] == ["process round_message", "publish round_message", "run the ServerApp"]
        assert above[-1] == "a person starts a run"


def ancestry(span: Span, spans: dict[str, Span]) -> list[str]:
    above = []
    while span.parent_id:
        span = spans[span.parent_id]
        above.append(span.name)
    return above
