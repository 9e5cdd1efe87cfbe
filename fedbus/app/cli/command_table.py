"""All commands: name, the function that runs it, and its line in `--help`."""

from typing import Final

from fedbus.app.cli.lazy import CommandEntry as Command
from fedbus.app.cli.lazy import CommandTable
from fedbus.app.cli.lazy import GroupEntry as Group

_RUN: Final[CommandTable] = {
    "start": Command("fedbus.app.cli.commands.run:start", "Start a run now."),
    "ls": Command("fedbus.app.cli.commands.run:ls", "List all runs and their states."),
    "show": Command(
        "fedbus.app.cli.commands.run:show",
        "Show one run: its state, and each round with its participants and failures.",
    ),
    "watch": Command(
        "fedbus.app.cli.commands.run:watch",
        "Show a run's progress until it ends; the exit code is 0 if it finished.",
    ),
    "stop": Command(
        "fedbus.app.cli.commands.run:stop", "Cancel a run; the result of its last round is not published."
    ),
    "curve": Command(
        "fedbus.app.cli.commands.curve:curve",
        "Draw loss and accuracy over all runs, and what each client's are, where its time went and what it brings.",
    ),
    "schedule": Command(
        "fedbus.app.cli.commands.schedule:schedule",
        "Show the schedule: its rule, the next run, what that waits for, and the last run with its trigger.",
    ),
}

_CLIENTS: Final[CommandTable] = {
    "ls": Command("fedbus.app.cli.commands.clients:ls", "List all clients and how they stand."),
    "show": Command(
        "fedbus.app.cli.commands.clients:show",
        "Show one client: its three lifecycles, and what each waits for.",
    ),
}

_MODEL: Final[CommandTable] = {
    "ls": Command("fedbus.app.cli.commands.model.ls:ls", "List all versions, newest first."),
    "show": Command("fedbus.app.cli.commands.model.ls:show", "Show all that is known of a version."),
    "diff": Command(
        "fedbus.app.cli.commands.model.diff:diff",
        "Compare two versions: how far each tensor has moved, and each metric.",
    ),
    "verify": Command(
        "fedbus.app.cli.commands.model.verify:verify",
        "Read every manifest and every artifact where it is kept, and see whether it is what it says.",
    ),
    "export": Command(
        "fedbus.app.cli.commands.model.export:export", "Copy the weights of a version into a file."
    ),
    "bucket": Command(
        "fedbus.app.cli.commands.model.bucket:bucket",
        "Create the bucket of a repository in an S3; an existing bucket stays unchanged.",
    ),
    "promote": Command(
        "fedbus.app.cli.commands.model.promote:promote",
        "Serve a version from now on, whatever the gate said of it, or a device that went back from it.",
    ),
    "rollback": Command(
        "fedbus.app.cli.commands.model.promote:rollback", "Serve the champion before this one again."
    ),
    "init": Command(
        "fedbus.app.cli.commands.model.promote:init",
        "With --new-lineage: begin anew with a first model, of the code that everybody has; all versions stay.",
    ),
    "access": Command(
        "fedbus.app.cli.commands.model.access:access",
        "Make the models of an S3 readable without a key, or only with one; or show the current access.",
    ),
    "keygen": Command("fedbus.app.cli.commands.model.keys:keygen", "Create the key pair that signs models."),
}

_CODE: Final[CommandTable] = {
    "ls": Command(
        "fedbus.app.cli.commands.code:ls",
        "List the commits of the ref that is followed, newest first, and who is on which.",
    ),
    "status": Command(
        "fedbus.app.cli.commands.code:status",
        "Say which version everybody is on, what is being rolled out and how far, and what was rejected.",
    ),
    "look": Command(
        "fedbus.app.cli.commands.code:look",
        "Have the server look at the repository now: for a hook, after a push.",
    ),
    "rollout": Command(
        "fedbus.app.cli.commands.code:rollout", "Bring a version to the clients, stage by stage."
    ),
    "revert": Command(
        "fedbus.app.cli.commands.code:revert",
        "End the rollout and bring everybody back; without one, to the version before this one.",
    ),
}

_DATA: Final[CommandTable] = {
    "ls": Command(
        "fedbus.app.cli.commands.data:ls",
        "List what each client has captured: rows, and how many have a label.",
    ),
    "export": Command(
        "fedbus.app.cli.commands.data:export",
        "Write a client's captured rows as a table, for pandas, DuckDB or Spark.",
    ),
}

_EVENTS: Final[CommandTable] = {
    "tail": Command(
        "fedbus.app.cli.commands.events.tail:tail", "Show events and transitions as they happen, one a line."
    ),
    "replay": Command(
        "fedbus.app.cli.commands.events.tail:replay",
        "Print the stored messages of a time window, in order. Publishes nothing.",
    ),
    "schema": Command(
        "fedbus.app.cli.commands.events.catalog:schema",
        "Print the JSON Schema of one message type's body, or of all types.",
    ),
    "decode": Command(
        "fedbus.app.cli.commands.events.decode:decode",
        "Print the msgpack on standard input as JSON: nats sub '…' --translate 'fedbus events decode'.",
    ),
    "catalog": Command(
        "fedbus.app.cli.commands.events.catalog:catalog",
        "List every message type: its subject, publisher and subscribers.",
    ),
}

_TASK: Final[CommandTable] = {
    "new": Command(
        "fedbus.app.cli.commands.task:new",
        "Write a new task: a small Flower app that trains, with all settings of fedbus explained.",
    ),
    "validate": Command(
        "fedbus.app.cli.commands.task:validate",
        "Validate a task: one line per problem; exit code 0 if there is none.",
    ),
}

_PROVISION: Final[CommandTable] = {
    "init": Command(
        "fedbus.app.cli.commands.provision.members:init",
        "Make a federation: operator, account, signing keys, server credentials, certificates, nats.conf.",
    ),
    "client": Command(
        "fedbus.app.cli.commands.provision.members:client",
        "Let a client in: its kit, for FEDBUS_KIT. The running server needs to know nothing of it.",
    ),
    "user": Command(
        "fedbus.app.cli.commands.provision.members:user",
        "Let a person in who works at a terminal: credentials of his own, which can be revoked alone.",
    ),
    "key": Command(
        "fedbus.app.cli.commands.provision.device:key",
        "On a device: make its own key, and print the public one, which is all that leaves it.",
    ),
    "complete": Command(
        "fedbus.app.cli.commands.provision.device:complete",
        "On a device: put its own key to the kit that was made for it.",
    ),
    "site": Command(
        "fedbus.app.cli.commands.provision.members:site",
        "A leaf node for a site: its clients connect to it, and one connection goes out to the federation.",
    ),
    "certificate": Command(
        "fedbus.app.cli.commands.provision.members:certificate",
        "A certificate for another server of the federation: its S3, its dashboard.",
    ),
    "list": Command(
        "fedbus.app.cli.commands.provision.members:list_",
        "Who was let in as what, until when, and who was put out.",
    ),
    "revoke": Command(
        "fedbus.app.cli.commands.provision.revocation:revoke",
        "Put somebody out: the credentials are worth nothing from now on, and the server drops who uses them.",
    ),
    "rotate": Command(
        "fedbus.app.cli.commands.provision.revocation:rotate",
        "Make something anew: one key, the server's certificate, the authority, or what signs for devices.",
    ),
    "push": Command(
        "fedbus.app.cli.commands.provision.revocation:push",
        "Tell the running server who belongs to the federation.",
    ),
}

COMMANDS: Final[CommandTable] = {
    "demo": Command(
        "fedbus.app.cli.commands.demo:demo",
        "Show the whole life of a federated model on this machine, on real data.",
    ),
    "up": Command(
        "fedbus.app.cli.commands.up:up",
        "Bring up everything on this machine: bus, server and clients; it stays up until Ctrl-C.",
    ),
    "run": Group("Start training runs, look at them, stop them.", _RUN),
    "clients": Group("Who takes part, what each does now, which model it serves.", _CLIENTS),
    "top": Command(
        "fedbus.app.cli.commands.top:top",
        "Watch servers, runs and clients, live: states, models, load, when last seen, why one does not train.",
    ),
    "why": Command(
        "fedbus.app.cli.commands.why:why",
        "Say why a client does what it does, and why it does not take part in a run.",
    ),
    "trace": Command(
        "fedbus.app.cli.commands.trace:trace", "Draw what happened in a run, and what it waited for."
    ),
    "verify": Command(
        "fedbus.app.cli.commands.verify:verify",
        "Show which code, configuration, clients and updates made a run's model, and check each of them.",
    ),
    "model": Group("Model versions of a task: list, verify, promote, export.", _MODEL),
    "code": Group("The versions of a task's code: what is where, and what is tried.", _CODE),
    "data": Group("What the clients on this machine have captured. It never leaves it by itself.", _DATA),
    "events": Group("Show, replay and decode messages.", _EVENTS),
    "task": Group("Create a task, or validate one.", _TASK),
    "server": Group(
        "The server side of a task.",
        {
            "up": Command(
                "fedbus.app.cli.commands.run_agents:server_up",
                "Run the four agents of the server side of each task in this process.",
            )
        },
    ),
    "client": Group(
        "One client, on this machine.",
        {
            "up": Command(
                "fedbus.app.cli.commands.run_agents:client_up",
                "Run a client's four agents in this process, for each of its tasks; ports count up with the tasks.",
            )
        },
    ),
    "agent": Command(
        "fedbus.app.cli.commands.run_agents:agent",
        "Run one agent in the foreground, or a few in one process.",
    ),
    "gateway": Command(
        "fedbus.app.cli.commands.gateway:gateway",
        "Serve the dashboard: the fleet, runs, training, events, models and schedules, live in a browser.",
    ),
    "provision": Group("Keys, credentials and certificates: who belongs to a federation.", _PROVISION),
    "context": Command(
        "fedbus.app.cli.commands.context:context",
        "Write a context for the `nats` program: address, credentials, authority and inbox.",
    ),
    "doctor": Command(
        "fedbus.app.cli.commands.doctor:doctor",
        "Check this machine and its NATS connection, and print how to fix each problem.",
    ),
    "version": Command(
        "fedbus.app.cli.commands.version:version", "Print version information for bug reports."
    ),
}
