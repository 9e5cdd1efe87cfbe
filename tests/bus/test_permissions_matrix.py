"""Each role tries everything that it has no permission for, on a nats-server as `fedbus provision` configures it.

A probe is an actual attempt with valid credentials. It counts as denied if the server reports the violation to the
client.
"""

import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.errors import Error as NatsError
from support import eventually
from support.trusted_bus import FED, TrustedBus, trusted_bus

from fedbus.agents.server_manager.state_registrar import serve_registrar
from fedbus.app.failures import CliError
from fedbus.app.provision import jwt_claims
from fedbus.app.provision.keys import Key, KeyType
from fedbus.app.provision.nats_config import ServerLocation
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.credentials import BusAccess
from fedbus.bus.errors import AccessDenied, PermissionDenied
from fedbus.contracts import subjects
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.envelope import make_envelope, pack
from fedbus.contracts.identifiers import BadId
from fedbus.contracts.permissions import (
    CLIENT_TAG_TEMPLATE,
    NAME_TEMPLATE,
    TASK_TAG_TEMPLATE,
    Permissions,
    Role,
    permissions_for,
)
from fedbus.contracts.state_recall import GetLastTransition

ROOT = "fedbus.test"
DEVICE = "c1"
EVENTS, LIFE, DEAD = (f"FEDBUS_test_{name}" for name in ("EVENTS", "LIFE", "DEAD"))
CONSUMER = json.dumps(
    {
        "stream_name": EVENTS,
        "config": {
            "durable_name": "evil",
            "name": "evil",
            "deliver_subject": f"{ROOT}.deliver.c1.mnist.evil",
            "deliver_policy": "all",
            "ack_policy": "none",
        },
    }
).encode()

DEVICE_MAY_NOT_PUBLISH = [
    # in the name of another client
    f"{ROOT}.client.c2.mnist.fin_train",
    f"{ROOT}.client.c2.mnist.joined",
    f"{ROOT}.client.c2.mnist.round_reply",
    f"{ROOT}.client.c2.mnist.heartbeat",
    f"{ROOT}.local.c2.mnist.client_start",
    f"{ROOT}.local.c2.mnist.infer_update",
    f"{ROOT}.local.c2.mnist.predict",
    f"{ROOT}.local.c1.mnist.predict",
    f"{ROOT}.svc.mnist.enroll.c2",
    f"{ROOT}.svc.mnist.recall_life.c2",
    f"{ROOT}.life.client.c2.mnist",
    f"{ROOT}.life.fl_client.c2.mnist",
    f"{ROOT}.life.inference.c2.mnist",
    f"{ROOT}.dead.c2.inference",
    # as the server side
    f"{ROOT}.cast.mnist.update_ready",
    f"{ROOT}.cast.mnist.model_published",
    f"{ROOT}.cast.mnist.code_published",
    f"{ROOT}.cast.mnist.server_closed",
    f"{ROOT}.cmd.c1.mnist.round_message",
    f"{ROOT}.cmd.c2.mnist.round_message",
    f"{ROOT}.srv.mnist.round_finished",
    f"{ROOT}.srv.mnist.run_finished",
    f"{ROOT}.life.server.mnist",
    f"{ROOT}.life.run.mnist-1",
    f"{ROOT}.dead.server.server-manager",
    # requests of users
    f"{ROOT}.svc.mnist.start_run",
    f"{ROOT}.svc.mnist.stop_run",
    f"{ROOT}.svc.mnist.open_run",
    f"{ROOT}.svc.mnist.promote_model",
    f"{ROOT}.svc.mnist.roll_back_model",
    # weights
    f"{ROOT}.blob.c2.trainer_1.ask.c1",
    f"{ROOT}.blob.server.flower-server_1.ask.c2",
    f"{ROOT}.blob.c2.trainer_1.in.0123456789abcdef.0",
    f"{ROOT}.blob.server.flower-server_1.cast.1.0",
    f"{ROOT}.blob.c2.trainer_1.cast.1.0",
    # another's inbox, acknowledgements and deliveries
    "_INBOX.c2.trainer.x",
    "_INBOX.server.server-manager.x",
    "_INBOX.people.cli.x",
    f"$JS.ACK.{EVENTS}.c2_mnist_trainer.1.1.1.1.0",
    f"$JS.ACK.{EVENTS}.c1_mnist_trainer.1.1.1.1.0",
    f"{ROOT}.deliver.c2.mnist.trainer",
    f"{ROOT}.deliver.c1.mnist.trainer",
    # the streams and the broker itself
    f"$JS.API.CONSUMER.CREATE.{EVENTS}",
    f"$JS.API.CONSUMER.CREATE.{EVENTS}.evil",
    f"$JS.API.CONSUMER.CREATE.{EVENTS}.evil.{ROOT}.cast.>",
    f"$JS.API.CONSUMER.DURABLE.CREATE.{EVENTS}.evil",
    f"$JS.API.CONSUMER.DELETE.{EVENTS}.c2_mnist_trainer",
    f"$JS.API.CONSUMER.INFO.{EVENTS}.c1_mnist_trainer",
    f"$JS.API.CONSUMER.MSG.NEXT.{EVENTS}.c2_mnist_trainer",
    f"$JS.API.CONSUMER.NAMES.{EVENTS}",
    f"$JS.API.STREAM.CREATE.{EVENTS}",
    "$JS.API.STREAM.CREATE.EVIL",
    f"$JS.API.STREAM.UPDATE.{EVENTS}",
    f"$JS.API.STREAM.DELETE.{EVENTS}",
    f"$JS.API.STREAM.PURGE.{EVENTS}",
    f"$JS.API.STREAM.MSG.GET.{LIFE}",
    f"$JS.API.STREAM.MSG.DELETE.{LIFE}",
    f"$JS.API.STREAM.INFO.{EVENTS}",
    f"$JS.API.DIRECT.GET.{LIFE}",
    f"$JS.API.DIRECT.GET.{LIFE}.{ROOT}.life.client.c1.mnist",
    "$JS.API.INFO",
    "$JS.API.STREAM.NAMES",
    "$SRV.PING",
    "$SYS.REQ.CLAIMS.UPDATE",
    "$SYS.REQ.SERVER.PING",
    # another federation, and subjects outside of fedbus
    "fedbus.other.client.c1.mnist.fin_train",
    "elsewhere",
]

DEVICE_MAY_NOT_SUBSCRIBE = [
    ">",
    "fedbus.>",
    f"{ROOT}.>",
    f"{ROOT}.client.>",
    f"{ROOT}.client.c1.>",
    f"{ROOT}.cmd.>",
    f"{ROOT}.cmd.*.mnist.round_message",
    f"{ROOT}.cmd.c2.>",
    f"{ROOT}.local.c2.>",
    f"{ROOT}.local.*.mnist.predict",
    f"{ROOT}.svc.>",
    f"{ROOT}.svc.mnist.enroll.*",
    f"{ROOT}.srv.>",
    f"{ROOT}.life.>",
    f"{ROOT}.dead.>",
    f"{ROOT}.deliver.>",
    f"{ROOT}.deliver.c2.>",
    f"{ROOT}.deliver.c2.mnist.trainer",
    f"{ROOT}.deliver.server.mnist.server-manager",
    f"{ROOT}.blob.>",
    f"{ROOT}.blob.c2.>",
    f"{ROOT}.blob.c2.*.in.>",
    f"{ROOT}.blob.*.*.in.>",
    f"{ROOT}.blob.server.*.in.>",
    f"{ROOT}.blob.server.*.ask.*",
    f"{ROOT}.blob.c2.trainer_1.ask.*",
    "_INBOX.>",
    "_INBOX.*.>",
    "_INBOX.c2.>",
    "_INBOX.c2.trainer.>",
    "_INBOX.server.>",
    "_INBOX.people.>",
    "$JS.API.>",
    "$JS.ACK.>",
    "$JS.EVENT.>",
    "$SYS.>",
    "$SRV.>",
    "$SRV.PING.fedbus-server-manager",
    "fedbus.other.>",
]

MAY_NOT_PUBLISH: dict[Role, list[str]] = {
    Role.OBSERVER: [
        f"{ROOT}.svc.mnist.start_run",
        f"{ROOT}.svc.mnist.stop_run",
        f"{ROOT}.svc.mnist.promote_model",
        f"{ROOT}.svc.mnist.enroll.c1",
        f"{ROOT}.local.c1.mnist.predict",
        f"{ROOT}.cast.mnist.update_ready",
        f"{ROOT}.life.run.mnist-1",
        f"$JS.API.STREAM.DELETE.{EVENTS}",
        f"$JS.API.STREAM.PURGE.{EVENTS}",
        f"$JS.API.CONSUMER.DELETE.{EVENTS}.c1_mnist_trainer",
        f"{ROOT}.blob.c1.trainer_1.ask.people",
        "_INBOX.c1.trainer.x",
    ],
    Role.USER: [
        f"{ROOT}.svc.mnist.open_run",
        f"{ROOT}.svc.mnist.start_server",
        f"{ROOT}.svc.mnist.enroll.c1",
        f"{ROOT}.cast.mnist.model_published",
        f"{ROOT}.cmd.c1.mnist.round_message",
        f"{ROOT}.client.c1.mnist.fin_train",
        f"{ROOT}.life.server.mnist",
        f"{ROOT}.blob.c1.trainer_1.ask.people",
        f"$JS.API.STREAM.DELETE.{LIFE}",
        f"$JS.API.STREAM.UPDATE.{LIFE}",
    ],
    Role.GATEWAY: [
        f"{ROOT}.cast.mnist.model_published",
        f"{ROOT}.svc.mnist.enroll.c1",
        f"{ROOT}.life.run.mnist-1",
        f"{ROOT}.blob.c1.trainer_1.ask.server",
        f"$JS.API.STREAM.DELETE.{LIFE}",
        "_INBOX.server.server-manager.x",
    ],
    Role.WORKFLOW_SCHEDULER: [
        f"{ROOT}.cast.mnist.model_published",
        f"{ROOT}.svc.mnist.start_run",
        f"{ROOT}.life.server.mnist",
        f"{ROOT}.client.c1.mnist.fin_train",
        f"$JS.API.STREAM.DELETE.{LIFE}",
    ],
    Role.FLOWER_SERVER: [
        f"{ROOT}.cast.mnist.model_published",
        f"{ROOT}.svc.mnist.open_run",
        f"{ROOT}.life.run.mnist-1",
        f"{ROOT}.client.c1.mnist.fin_train",
        f"$JS.API.STREAM.PURGE.{EVENTS}",
    ],
    Role.SERVER_MANAGER: [
        f"{ROOT}.life.run.mnist-1",
        f"{ROOT}.life.client.c1.mnist",
        f"{ROOT}.client.c1.mnist.fin_train",
        f"{ROOT}.cmd.c1.mnist.round_message",
        f"$JS.API.STREAM.DELETE.{LIFE}",
        "$SYS.REQ.CLAIMS.UPDATE",
        "fedbus.other.cast.mnist.model_published",
    ],
    Role.SERVER: [
        f"{ROOT}.client.c1.mnist.fin_train",
        f"{ROOT}.life.client.c1.mnist",
        f"$JS.API.STREAM.DELETE.{LIFE}",
        "$JS.API.STREAM.CREATE.EVIL",
        "$SYS.REQ.CLAIMS.UPDATE",
        "fedbus.other.cast.mnist.model_published",
    ],
}

MAY_NOT_SUBSCRIBE: dict[Role, list[str]] = {
    Role.OBSERVER: [
        f"{ROOT}.blob.>",
        f"{ROOT}.>",
        "_INBOX.c1.>",
        "_INBOX.server.>",
        "$SYS.>",
        "fedbus.other.>",
    ],
    Role.USER: [f"{ROOT}.blob.c1.*.in.>", f"{ROOT}.blob.server.*.in.>", ">", "_INBOX.server.>", "$SYS.>"],
    Role.GATEWAY: [f"{ROOT}.blob.>", "_INBOX.server.server-manager.>", "_INBOX.people.>", ">", "$SYS.>"],
    Role.WORKFLOW_SCHEDULER: [
        "_INBOX.server.server-manager.>",
        "_INBOX.c1.>",
        f"{ROOT}.local.>",
        ">",
        "$SYS.>",
    ],
    Role.FLOWER_SERVER: ["_INBOX.server.server-manager.>", f"{ROOT}.local.>", "fedbus.other.>", "$SYS.>"],
    Role.SERVER_MANAGER: ["_INBOX.people.>", "_INBOX.c1.>", f"{ROOT}.local.>", "fedbus.other.>", "$SYS.>"],
    Role.SERVER: ["_INBOX.people.>", "_INBOX.c1.>", f"{ROOT}.local.>", "fedbus.other.>", "$SYS.>"],
}


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[TrustedBus]:
    async with trusted_bus(tmp_path) as bus:
        manager = Identity(FED, "server-manager")
        async with Bus.connect(bus.url, manager, access=bus.access_for(Role.SERVER_MANAGER)) as server:
            await server.create_streams()
            for client in ("c1", "c2"):
                await server.create_client_consumer(AgentName.TRAINER, task="mnist", client=client)
        yield bus


@dataclass
class PermissionProber:
    """Tries to publish and subscribe with given credentials."""

    client: Client
    errors: list[str]

    async def can_publish(self, subject: str, body: bytes = b"{}", reply: str = "") -> bool:
        return await self._is_permitted(
            lambda: self.client.publish(subject, body, reply=reply), f'publish to "{subject}"'
        )

    async def can_subscribe(self, subject: str) -> bool:
        return await self._is_permitted(
            partial(self.client.subscribe, subject), f'subscription to "{subject}"'
        )

    async def _is_permitted(self, attempt: Callable[[], Awaitable[object]], violation: str) -> bool:
        self.errors.clear()
        await attempt()
        await self.client.flush()
        try:
            await eventually(lambda: any(violation.lower() in one.lower() for one in self.errors))
        except TimeoutError:
            return True
        return False


async def probe_denied(
    bus: TrustedBus, identity: Role | str, publish: list[str], subscribe: list[str]
) -> tuple[list[str], int]:
    """Return the probes that were *not* denied, and the number of all probes."""
    async with bus.connect(bus.access_for(identity), inbox="_INBOX.c1.probe") as (client, errors):
        prober = PermissionProber(client, errors)
        permitted = [
            f"publish {subject}" for subject in publish if await prober.can_publish(subject, CONSUMER)
        ]
        permitted += [f"subscribe {subject}" for subject in subscribe if await prober.can_subscribe(subject)]
    return permitted, len(publish) + len(subscribe)


async def test_a_device_is_denied_all_that_is_not_its_own(bus: TrustedBus) -> None:
    permitted, probes = await probe_denied(bus, DEVICE, DEVICE_MAY_NOT_PUBLISH, DEVICE_MAY_NOT_SUBSCRIBE)

    assert not permitted
    assert probes >= 60


@pytest.mark.parametrize("role", MAY_NOT_PUBLISH)
async def test_each_role_is_denied_what_is_not_its_own(bus: TrustedBus, role: Role) -> None:
    permitted, _ = await probe_denied(bus, role, MAY_NOT_PUBLISH[role], MAY_NOT_SUBSCRIBE[role])
    assert not permitted


# --- permissions of other roles: the complement of each role's own table --------------------------------------

HOSTILE_NAMES = ("c2.>", "a.b", "c1 c2", "{{name()}}", "{{tag(client)}}", " ", "")
OTHERS = "c2"


def expand_template(subject: str, client: str) -> str:
    """Return one concrete subject for a template or pattern, of this *client*."""
    concrete = subject
    for template in (NAME_TEMPLATE, CLIENT_TAG_TEMPLATE):
        concrete = concrete.replace(template, client)
    return concrete.replace(TASK_TAG_TEMPLATE, "mnist").replace("*", "x").replace(">", "x.y")


def covers(allowed: str, subject: str) -> bool:
    """Return whether the pattern *allowed* matches *subject*, which has no wildcards."""
    pattern = re.escape(allowed).replace(r"\*", "[^.]+").replace(">", ".+")
    return re.fullmatch(pattern, subject) is not None


def complement(role: Role, what: Callable[[Permissions], tuple[str, ...]]) -> list[str]:
    """Return the permissions of other roles, and of another device, that *role* does not have (a device is c1)."""
    own = [
        one.replace(NAME_TEMPLATE, DEVICE)
        .replace(CLIENT_TAG_TEMPLATE, DEVICE)
        .replace(TASK_TAG_TEMPLATE, "mnist")
        for one in what(permissions_for(FED, role))
    ]
    all_subjects = {
        expand_template(one, OTHERS) for other in Role for one in what(permissions_for(FED, other))
    }
    return sorted(one for one in all_subjects if not any(covers(allowed, one) for allowed in own))


async def probe_all(
    client: Client, errors: list[str], publish: list[str], subscribe: list[str], *, within_s: float = 40
) -> list[str]:
    """Try everything at once, and return what the server did not deny."""
    errors.clear()
    for subject in publish:
        await client.publish(subject, b"{}")
    for subject in subscribe:
        await client.subscribe(subject)
    await client.flush()
    expected = {f'publish to "{one}"'.lower() for one in publish} | {
        f'subscription to "{one}"'.lower() for one in subscribe
    }

    def missing() -> list[str]:
        reported = "\n".join(errors).lower()
        return sorted(one for one in expected if one not in reported)

    with contextlib.suppress(TimeoutError):
        await eventually(lambda: not missing(), within_s=within_s)
    return missing()


def access_of(bus: TrustedBus, role: Role, directory: Path) -> BusAccess:
    if role is Role.DEVICE:
        return bus.access_for(DEVICE)
    if role is not Role.SITE:
        return bus.access_for(role)
    bus.access_for(DEVICE)
    place = ServerLocation(directory / "lab", 4222)
    bus.federation.write_site("lab", [DEVICE], ["mnist"], place.directory, place, hosts=["lab"], days=1)
    return BusAccess(directory / "lab" / "site.creds", bus.federation.ca_path)


@pytest.mark.parametrize("role", Role)
async def test_each_role_is_denied_all_that_only_others_may(
    bus: TrustedBus, tmp_path: Path, role: Role
) -> None:
    publish = complement(role, lambda one: one.publish)
    subscribe = complement(role, lambda one: one.subscribe)
    assert len(publish) + len(subscribe) >= 60, "the table has too few entries for this test"
    async with bus.connect(access_of(bus, role, tmp_path), inbox="_INBOX.c1.probe") as (client, errors):
        assert not await probe_all(client, errors, publish, subscribe)


def sign_device(bus: TrustedBus, name: str, directory: Path) -> BusAccess:
    """Sign credentials of a device of any *name*, as with the signing key but without our checks."""
    key = Key.generate(KeyType.USER)
    signing = Key.load(bus.federation.folder / "keys" / "signing" / "device.nk")
    account = bus.federation.server_claims().account
    (directory / "hostile.creds").write_text(
        key.render_credentials(jwt_claims.user_jwt(signing, account, key.public, name))
    )
    return BusAccess(directory / "hostile.creds", bus.federation.ca_path)


@pytest.mark.parametrize("name", HOSTILE_NAMES)
async def test_a_signed_hostile_name_has_no_additional_permission(
    bus: TrustedBus, tmp_path: Path, name: str
) -> None:
    publish = complement(Role.DEVICE, lambda one: one.publish)
    subscribe = complement(Role.DEVICE, lambda one: one.subscribe)
    try:
        access = sign_device(bus, name, tmp_path)
        async with bus.connect(access, inbox="_INBOX.c1.probe") as (client, errors):
            permitted = await probe_all(client, errors, publish, subscribe)
    except NatsError as refused:
        assert "authorization" in str(refused).lower()  # noqa: PT017 (either is a denial)
    else:
        assert not permitted


@pytest.mark.parametrize("name", ["*", ">", "*.*", "c2.*"])
async def test_only_our_check_rejects_a_name_of_wildcards(bus: TrustedBus, tmp_path: Path, name: str) -> None:
    """nats-server 2.15 inserts the name into the template unchanged; if this test fails, a later version checks it."""
    async with bus.connect(sign_device(bus, name, tmp_path), inbox="_INBOX.c1.probe") as (
        client,
        errors,
    ):
        assert await probe_all(client, errors, [f"{ROOT}.svc.x.enroll.c2"], ["_INBOX.c2.x.y"], within_s=1)
    with pytest.raises((BadId, CliError)):
        bus.federation.admit(name)


async def test_denied_probes_leave_no_message_and_no_consumer(bus: TrustedBus) -> None:
    async with bus.connect(bus.access_for(Role.SERVER_MANAGER), inbox="_INBOX.server.server-manager") as (
        server,
        _,
    ):
        js = server.jetstream()
        before = {name: (await js.stream_info(name)).state.messages for name in (EVENTS, LIFE, DEAD)}
        await probe_denied(bus, DEVICE, DEVICE_MAY_NOT_PUBLISH, DEVICE_MAY_NOT_SUBSCRIBE)
        after = {name: (await js.stream_info(name)).state.messages for name in (EVENTS, LIFE, DEAD)}
        consumers = {info.name for info in await js.consumers_info(EVENTS)}
    assert after == before
    assert consumers == {"c1_mnist_trainer", "c2_mnist_trainer"}


async def test_a_client_without_credentials_is_rejected(bus: TrustedBus) -> None:
    with pytest.raises(AccessDenied, match="requires credentials"):
        async with Bus.connect(
            bus.url, Identity(FED, "trainer", "c1"), access=BusAccess(ca=bus.federation.ca_path)
        ):
            pass


# --- indirect: making another agent publish ------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        f"$JS.API.CONSUMER.CREATE.{EVENTS}.evil",
        f"$JS.API.STREAM.PURGE.{EVENTS}",
        f"$JS.API.STREAM.MSG.DELETE.{EVENTS}",
        f"{ROOT}.client.c2.mnist.fin_train",
        f"{ROOT}.cast.mnist.update_ready",
    ],
)
async def test_a_stream_acknowledgement_to_any_subject_is_harmless(bus: TrustedBus, place: str) -> None:
    async with (
        bus.connect(bus.access_for(Role.SERVER_MANAGER), inbox="_INBOX.server.server-manager") as (server, _),
        bus.connect(bus.access_for("c1"), inbox="_INBOX.c1.trainer") as (device, _),
    ):
        js = server.jetstream()
        await device.publish(f"{ROOT}.client.c1.mnist.joined", CONSUMER, reply=place)
        await device.flush()
        await device.publish(f"{ROOT}.client.c1.mnist.joined", CONSUMER, reply=place)
        await device.flush()

        async def both_are_stored() -> bool:
            return (await js.stream_info(EVENTS)).state.last_seq >= 2

        await eventually(both_are_stored)
        own = await js.get_last_msg(EVENTS, f"{ROOT}.client.c1.mnist.joined")
        assert own.data == CONSUMER
        assert {info.name for info in await js.consumers_info(EVENTS)} == {
            "c1_mnist_trainer",
            "c2_mnist_trainer",
        }


async def test_a_requester_cannot_choose_another_subject_for_the_reply(bus: TrustedBus) -> None:
    """The reply to a request whose reply subject is a cast is not sent."""
    request = GetLastTransition(task="mnist", client="c1", kind="client")
    headers = make_envelope(request, source="fedbus/test/client-manager/c1", trace={}).headers()
    async with (
        Bus.connect(bus.url, Identity(FED, "registrar"), access=bus.access_for(Role.SERVER_MANAGER)) as own,
        serve_registrar(own, "mnist"),
        bus.connect(bus.access_for(Role.OBSERVER), inbox="_INBOX.people.x") as (watcher, _),
        bus.connect(bus.access_for("c1"), inbox="_INBOX.c1.client-manager") as (device, _),
    ):
        casts = await watcher.subscribe(f"{ROOT}.cast.>")
        await watcher.flush()
        subject = subjects.subject_for(FED, request)
        await device.publish(subject, pack(request), reply=f"{ROOT}.cast.mnist.update_ready", headers=headers)
        reply = await device.request(subject, pack(request), headers=headers, timeout=30)
        assert reply.data
        await watcher.flush()
        assert casts.pending_msgs == 0


async def test_a_device_acknowledges_only_its_own_messages(bus: TrustedBus) -> None:
    async with (
        bus.connect(bus.access_for(Role.FLOWER_SERVER), inbox="_INBOX.server.flower-server") as (server, _),
        bus.connect(bus.access_for("c1"), inbox="_INBOX.c1.trainer") as (device, errors),
    ):
        inbox = await device.subscribe(f"{ROOT}.deliver.c1.mnist.trainer")
        await device.flush()
        for client in ("c1", "c2"):
            await server.jetstream().publish(f"{ROOT}.cmd.{client}.mnist.round_message", b"work")
        command = await inbox.next_msg(5)
        await command.ack()
        await device.flush()
        anothers = command.reply.replace("c1_mnist_trainer", "c2_mnist_trainer")
        await device.publish(anothers, b"+ACK")
        await device.flush()
        js = server.jetstream()

        async def acknowledged() -> bool:
            own = await js.consumer_info(EVENTS, "c1_mnist_trainer")
            return (own.num_ack_pending, own.num_pending) == (0, 0)

        async def refused() -> bool:
            return any("c2_mnist_trainer" in error for error in errors)

        await eventually(acknowledged)
        await eventually(refused)
        waiting = await js.consumer_info(EVENTS, "c2_mnist_trainer")
    assert (waiting.num_ack_pending or 0) + (waiting.num_pending or 0) == 1


async def test_a_request_without_permission_for_its_inbox_fails_at_once(
    bus: TrustedBus,
) -> None:
    """For example `fedbus run ls` with the credentials of a server agent, which has another inbox than a user."""
    user = Identity(FED, "cli", subjects.USERS)
    async with Bus.connect(bus.url, user, access=bus.access_for(Role.SERVER_MANAGER)) as user_bus:
        for _ in range(2):
            with pytest.raises(
                PermissionDenied, match=r"receive replies on _inbox\.people\.cli with these credentials"
            ):
                await user_bus.last_per_subject(LIFE, [f"{ROOT}.life.run.>"])
