"""One constant example of each message and of each reply.

The documentation shows them. The golden files have their encoded form, so that a test detects every change of
the wire format.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from fedbus.contracts import (
    champion,
    client,
    code,
    device,
    flower_server,
    round_messages,
    run,
    scheduling,
    server,
    serving,
    state_recall,
)
from fedbus.contracts.message import Body, Message, Refused
from fedbus.contracts.model import Artifact, BlobRef, ModelRef
from fedbus.contracts.transition import Transition

TASK: Final = "mnist"
CLIENT: Final = "c1"
RUN: Final = "mnist-2"
NOON: Final = datetime(2026, 3, 14, 12, 0, 0, 250_000, tzinfo=UTC)
SHA: Final = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
ARCHITECTURE: Final = "60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752"
COMMIT: Final = "3a1f6c0d9be2475f8a6e0b1c2d3e4f5061728394"
NEXT_COMMIT: Final = "b7e23ec29af22b0b4e41da31e868d57226121c84"
MESSAGE_ID: Final = "5e2c8f0a-7b1d-4c39-9a64-0d2f1e3b5a77"

ARTIFACT: Final = Artifact(sha256=SHA, size_bytes=439_576, architecture=ARCHITECTURE)
MODEL: Final = ModelRef(**dict(ARTIFACT), version=2)
BLOB: Final = BlobRef(sha256=SHA, size_bytes=439_576, chunk_bytes=1_048_576, holder="server.flower-server_1")
PLAN: Final = run.RunPlan(
    rounds=4, quorum=3, recruit_s=30, round_s=120, config={"lr": 0.02, "strategy": "fedavg"}
)
RESULT: Final = run.RoundResult(
    round=2,
    metrics={"loss": 0.25, "accuracy": 0.9375},
    seconds=6.5,
    participants={"c1": 18000, "c2": 18000},
    failures={"c3": "no reply within 120 s"},
    figures={"c1": {"train_loss": 0.5, "eval_accuracy": 0.875}},
    transfer_s={"c1": 0.25, "c2": 0.5},
    wait_s={"c1": 2.0, "c2": 0.125},
)
INVITATION: Final = server.UpdateReady(
    task=TASK, run=RUN, plan=PLAN, recruit_until=NOON, code_version=COMMIT, model=MODEL
)

COMPARISON: Final = serving.ModelComparison(
    samples=500, errors=0, disagreement=0.03125, answer_psi=0.015625, old_ms=1.5, new_ms=1.25
)

_EXAMPLES: Final[tuple[Message, ...]] = (
    server.HealthCheck(task=TASK),
    server.GetServerInfo(task=TASK),
    server.Enroll(task=TASK, client=CLIENT),
    state_recall.GetLastTransition(task=TASK, client=CLIENT, kind="client"),
    server.OpenRun(task=TASK, run=RUN, plan=PLAN, overrides=run.RunOverrides(rounds=4)),
    server.CancelRun(task=TASK, run=RUN, reason="stopped by hand"),
    flower_server.InitModel(task=TASK),
    flower_server.StartServer(task=TASK, run=RUN, plan=PLAN, artifact=ARTIFACT, first_round=3),
    flower_server.StopServer(task=TASK, run=RUN),
    flower_server.FindServer(task=TASK, run=RUN),
    run.StartRun(task=TASK, rounds=4, quorum=3, config={"lr": 0.02}),
    run.StopRun(task=TASK, run=RUN),
    champion.PromoteModel(task=TASK, model_version=3, reason="better on the data of site lab"),
    champion.RollBackModel(task=TASK, reason="users complain"),
    champion.StartLineage(task=TASK),
    code.LookForCode(task=TASK),
    code.RollOutCode(task=TASK, code_version=NEXT_COMMIT, stages=("site=lab", "25%", "100%")),
    code.RevertCode(task=TASK),
    code.CheckCode(task=TASK, code_version=NEXT_COMMIT, like=SHA),
    flower_server.ServerStarted(task=TASK, run=RUN),
    flower_server.BeginTraining(task=TASK, run=RUN, cohort=("c1", "c2", "c3")),
    flower_server.RoundFinished(task=TASK, run=RUN, round=2, result=RESULT, checkpoint=ARTIFACT),
    flower_server.RunFinished(task=TASK, run=RUN, artifact=ARTIFACT, rounds=4),
    flower_server.RunFailed(task=TASK, run=RUN, reason="the ServerApp raised ValueError: no such strategy"),
    flower_server.ServerLost(task=TASK, run=RUN, reason="was killed (SIGKILL, possibly out of memory)"),
    INVITATION,
    server.ModelPublished(task=TASK, model=MODEL, blob=BLOB, run=RUN),
    code.CodePublished(
        task=TASK,
        code_version=COMMIT,
        candidate=NEXT_COMMIT,
        cohort=code.RolloutCohort(up_to=0.25),
        attempt=2,
    ),
    server.ServerClosed(task=TASK, run=RUN, outcome="finished", rounds=4),
    round_messages.RoundMessage(
        task=TASK,
        client=CLIENT,
        run=RUN,
        message_id=MESSAGE_ID,
        message_type="train",
        round=2,
        group_id="2",
        created_at=1_773_489_600.25,
        ttl_s=120.0,
        content=round_messages.MessageContent(blob=BLOB),
    ),
    client.ClientJoined(task=TASK, client=CLIENT, run=RUN, code_version=COMMIT),
    client.ClientDeclined(
        task=TASK,
        client=CLIENT,
        run=RUN,
        reason="either battery is 10 %, and should be above 30 %, or the device is not charging",
        rule="battery > 30 or charging",
        facts={"battery": 10.0, "charging": 0.0},
    ),
    client.RoundReply(
        task=TASK,
        client=CLIENT,
        run=RUN,
        round=2,
        message_id="c0ffee00-7b1d-4c39-9a64-0d2f1e3b5a77",
        reply_to=MESSAGE_ID,
        created_at=1_773_489_604.75,
        ttl_s=115.5,
        content=round_messages.MessageContent(inline=b"\x00\x01\x02\xff"),
        train_s=4.25,
        left_out=3,
        figures={"train_loss": 0.5, "train_accuracy": 0.875, "train_num-examples": 18000.0},
    ),
    client.FinTrain(task=TASK, client=CLIENT, run=RUN, rounds=4),
    client.FailTrain(task=TASK, client=CLIENT, run=RUN, reason="the trainer was killed", trainer_lost=True),
    client.Heartbeat(task=TASK, client=CLIENT, run=RUN),
    device.DeviceReport(
        task=TASK,
        client=CLIENT,
        cpu=0.42,
        memory=0.61,
        disk=0.37,
        temperature_c=58.5,
        gpus=(
            device.GpuUse(
                name="Orin", utilization=0.8, memory_bytes=2 * 1024**3, memory_total_bytes=8 * 1024**3
            ),
        ),
        agents={"client-manager": True, "flower-client": True, "inference": False},
        errors=1,
        last_error="the model cannot be loaded: no such file",
    ),
    code.CodeReady(task=TASK, client=CLIENT, code_version=NEXT_COMMIT, attempt=2),
    code.CodeRefused(
        task=TASK,
        client=CLIENT,
        code_version=NEXT_COMMIT,
        reason="its signature is not from an allowed signer whose key was valid then",
        stays_on=COMMIT,
        attempt=2,
    ),
    serving.ModelPrepared(
        task=TASK,
        client=CLIENT,
        model=MODEL,
        serving=1,
        load_s=0.25,
        probed=8,
        replayed=64,
        holdout=120,
        old_score=0.875,
        new_score=0.9375,
    ),
    serving.ModelShadowed(task=TASK, client=CLIENT, model=MODEL, serving=1, beside=COMPARISON, seconds=12.5),
    serving.ModelCanaried(
        task=TASK, client=CLIENT, model=MODEL, serving=1, share=0.25, beside=COMPARISON, seconds=20.0
    ),
    serving.ModelCommitted(task=TASK, client=CLIENT, model=MODEL, replaced=1, drained=3, drain_s=0.0625),
    serving.ModelRejected(
        task=TASK,
        client=CLIENT,
        model=MODEL,
        serving=1,
        step="holdout",
        reason="score 0.75 on 120 labelled samples of this device, current model 0.875: 0.125 lower (limit 0.05)",
        old_score=0.875,
        new_score=0.75,
    ),
    serving.ModelRolledBack(
        task=TASK,
        client=CLIENT,
        model=MODEL.model_copy(update={"version": 1}),
        returned_from=MODEL,
        reason="3 errors on requests that the current model answered (limit 3)",
        beside=COMPARISON.model_copy(update={"errors": 3}),
    ),
    serving.CapturePaused(task=TASK, client=CLIENT, reason="database or disk is full", dropped=17),
    serving.CaptureResumed(task=TASK, client=CLIENT, dropped=230),
    serving.DataCounted(
        task=TASK,
        client=CLIENT,
        labelled=64,
        unlabelled=512,
        holdout=16,
        labelled_ever=96,
        unlabelled_ever=4096,
        database="5eed",
    ),
    serving.DataChecked(
        task=TASK,
        client=CLIENT,
        rows=1000,
        findings=(
            serving.DataCheckResult(
                check="range",
                ok=False,
                value=0.25,
                limit=0.0,
                what="250 of 1000 rows have values outside the expected range",
            ),
        ),
        classes={"0": 30, "1": 34},
        inputs=(
            serving.FeatureDistribution(feature="mean", counts=(90, 110, 800), psi=0.5, ks=0.25, p=0.001),
        ),
        predictions=serving.FeatureDistribution(feature="class", counts=(480, 520), psi=0.0625),
        drifting=True,
        drift_unknown="SciPy is not installed: pip install 'fedbus[drift]'",
        serving=2,
        live=(serving.LiveAccuracy(version=2, labelled=64, right=60),),
        seconds=0.125,
    ),
    serving.DriftDetected(
        task=TASK,
        client=CLIENT,
        of="inputs",
        feature="mean",
        score=0.5,
        ks=0.25,
        p=0.001,
        features=2,
        rows=1000,
    ),
    client.ClientStart(task=TASK, client=CLIENT, run=RUN, plan=PLAN, code_version=COMMIT),
    client.RoundStarted(task=TASK, client=CLIENT, run=RUN, round=1),
    client.InferStart(task=TASK, client=CLIENT, model=MODEL, path="/var/lib/fedbus/models/2.safetensors"),
    client.InferUpdate(
        task=TASK, client=CLIENT, model=MODEL, path="/var/lib/fedbus/models/2.safetensors", term=4
    ),
    client.InferReady(task=TASK, client=CLIENT, model=MODEL, endpoint="http://127.0.0.1:8080"),
    client.InferRefused(task=TASK, client=CLIENT, model=MODEL, reason="3 of 8 probes gave NaN", serving=1),
    Transition(
        task=TASK,
        event="client_start",
        source="serving",
        target="learning",
        reason="run mnist-2",
        waits_for="the run to end",
        deadline=NOON,
        facts=client.ClientData(client=CLIENT, task=TASK, model=MODEL, run=RUN, code_version=COMMIT),
    ),
)

EXAMPLES: Final[Mapping[type[Message], Message]] = {type(example): example for example in _EXAMPLES}

REPLIES: Final[Mapping[type[Body], Body]] = {
    type(answer): answer
    for answer in (
        server.HealthStatus(state=server.ServerState.RECRUITING, open_run=INVITATION),
        server.ServerInfo(code_version=COMMIT, model=MODEL, blob=BLOB),
        server.Enrolled(consumers=("c1_mnist_client-manager", "c1_mnist_inference")),
        state_recall.LastTransition(
            sequence=7,
            headers={"ce-id": "01890000-0000-7000-8000-000000000001"},
            body=b"\x80",
            answered_at=1767225600.5,
        ),
        server.RunOpened(recruit_until=NOON),
        server.RunCancelled(),
        flower_server.ModelInitialised(artifact=ARTIFACT),
        flower_server.ServerStarting(),
        flower_server.ServerStopped(),
        flower_server.ServerFound(up=True),
        run.RunStarted(run=RUN),
        champion.ModelPromoted(model=MODEL, instead_of=3),
        code.CodeLookedFor(found=NEXT_COMMIT, news="rolled out to 25% of the clients"),
        code.RolloutBegun(code_version=NEXT_COMMIT, stages=("25%", "100%")),
        code.CodeChecked(architecture=ARCHITECTURE),
        run.RunStopped(run=RUN),
        Refused(reason="run mnist-1 is still running"),
    )
}

FACTS: Final = (
    server.ServerData(
        task=TASK,
        code_version=COMMIT,
        model=MODEL,
        run=RUN,
        plan=PLAN,
        recruit_until=NOON,
        cohort=("c1", "c2", "c3"),
        round=2,
        last=RESULT,
        checkpoint=ARTIFACT,
    ),
    code.CodeData(
        task=TASK,
        code_version=COMMIT,
        candidate=NEXT_COMMIT,
        stages=("25%", "100%"),
        cohort=code.RolloutCohort(up_to=0.25),
        clients=("c1",),
        ready=("c1",),
        source="https://example.org/tasks.git main",
    ),
    scheduling.ScheduleData(
        task=TASK,
        holder="server/workflow-scheduler_1",
        since=NOON,
        clock_since=NOON,
        due_since=NOON,
        cause="labelled >= 64 on 3 clients (c1: 70, c2: 64, c3: 90)",
        started=1,
        run=RUN,
        labelled={"c1": 12},
        databases={"c1": "5eed"},
        drifted=("c3",),
        accuracy={"c1": 0.9375},
        code_version=COMMIT,
        rule=scheduling.ScheduleRule(
            when="cron '0 3 * * *' or labelled >= 64 on 3 clients",
            timezone="Europe/Berlin",
            quiet="hour in 8..18",
            debounce_s=60.0,
        ),
        next_at=NOON,
        awaits=("cron '0 3 * * *'", "labelled >= 64 on 3 clients (1 so far)"),
        fired_at=NOON,
        fired_for="cron '0 3 * * *'",
    ),
    run.RunData(
        task=TASK,
        run=RUN,
        plan=PLAN,
        trigger="schedule",
        requested_at=NOON,
        rounds=(RESULT,),
        cohort=("c1", "c2", "c3"),
        model=MODEL,
        trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
        traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    ),
    client.ClientData(client=CLIENT, task=TASK, model=MODEL, run=RUN, code_version=COMMIT),
    client.FlClientData(client=CLIENT, task=TASK, run=RUN),
    client.InferenceData(client=CLIENT, task=TASK, model=MODEL, endpoint="http://127.0.0.1:8080"),
)
"""The data of each kind of lifecycle, as a transition carries them."""
