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
        "Draw loss and accuracy over all runs, and list the time, quality and contribution of each client.",
    ),
    "schedule": Command(
        "fedbus.app.cli.commands.schedule:schedule",
        "Show each schedule: its trigger, the next run and what it waits for, and the last run.",
    ),
}

_CLIENTS: Final[CommandTable] = {
    "ls": Command(
        "fedbus.app.cli.commands.clients:ls", "List all clients with their states, models and rounds."
    ),
    "show": Command(
        "fedbus.app.cli.commands.clients:show",
        "Show one client: its lifecycles, what each waits for, its device and its accuracy.",
    ),
}

_MODEL: Final[CommandTable] = {
    "ls": Command("fedbus.app.cli.commands.model.ls:ls", "List all versions, newest first."),
    "show": Command("fedbus.app.cli.commands.model.ls:show", "Show the manifest of a version."),
    "diff": Command(
        "fedbus.app.cli.commands.model.diff:diff", "Compare the tensors and metrics of two versions."
    ),
    "verify": Command(
        "fedbus.app.cli.commands.model.verify:verify",
        "Read all manifests and weights in the repository and verify their digests.",
    ),
    "export": Command(
        "fedbus.app.cli.commands.model.export:export", "Copy the weights of a version to a file."
    ),
    "bucket": Command(
        "fedbus.app.cli.commands.model.bucket:bucket",
        "Create the S3 bucket of a model repository; an existing bucket is not changed.",
    ),
    "promote": Command(
        "fedbus.app.cli.commands.model.promote:promote",
        "Promote a version even if the gate rejected it or a device rolled it back.",
    ),
    "rollback": Command(
        "fedbus.app.cli.commands.model.promote:rollback", "Roll back to the previous champion."
    ),
    "init": Command(
        "fedbus.app.cli.commands.model.promote:init",
        "With --new-lineage: build and promote a first model from the deployed code; all versions are kept.",
    ),
    "access": Command(
        "fedbus.app.cli.commands.model.access:access",
        "Allow or forbid reading models in S3 without a key, or show the current access.",
    ),
    "keygen": Command("fedbus.app.cli.commands.model.keys:keygen", "Create the key pair that signs models."),
}

_CODE: Final[CommandTable] = {
    "ls": Command(
        "fedbus.app.cli.commands.code:ls",
        "List the commits of the followed ref, newest first, with the number of clients on each.",
    ),
    "status": Command(
        "fedbus.app.cli.commands.code:status",
        "Show the deployed version, the rollout and its stage, and the rejected versions.",
    ),
    "look": Command(
        "fedbus.app.cli.commands.code:look",
        "Poll the code repository now, for example in a hook after a push.",
    ),
    "rollout": Command(
        "fedbus.app.cli.commands.code:rollout", "Roll out a code version to the clients, stage by stage."
    ),
    "revert": Command(
        "fedbus.app.cli.commands.code:revert",
        "Cancel the rollout, or without one deploy the previous version.",
    ),
}

_DATA: Final[CommandTable] = {
    "ls": Command(
        "fedbus.app.cli.commands.data:ls", "List the captured rows of each client, and how many have a label."
    ),
    "export": Command(
        "fedbus.app.cli.commands.data:export",
        "Export a client's captured rows to a file for pandas, DuckDB or Spark.",
    ),
    "partition": Command(
        "fedbus.app.cli.commands.partition:partition",
        "Divide a data set among clients, and show how many samples of each class they get.",
    ),
}

_PROFILE: Final[CommandTable] = {
    "ls": Command("fedbus.app.cli.commands.profile:ls", "List the built-in profiles."),
    "show": Command(
        "fedbus.app.cli.commands.profile:show",
        "Show the groups of a profile: the number of clients of each, and their conditions.",
    ),
    "check": Command(
        "fedbus.app.cli.commands.profile:check",
        "Check a profile: its keys and values, and that its groups fit a number of clients.",
    ),
}

_EVENTS: Final[CommandTable] = {
    "tail": Command(
        "fedbus.app.cli.commands.events.tail:tail", "Show events and transitions live, one per line."
    ),
    "replay": Command(
        "fedbus.app.cli.commands.events.tail:replay",
        "Print the stored messages of a time window, in order; nothing is published.",
    ),
    "schema": Command(
        "fedbus.app.cli.commands.events.catalog:schema",
        "Print the JSON Schema of one message type's body, or of all types.",
    ),
    "decode": Command(
        "fedbus.app.cli.commands.events.decode:decode",
        "Print the msgpack body on standard input as JSON: nats sub '…' --translate 'fedbus events decode'.",
    ),
    "catalog": Command(
        "fedbus.app.cli.commands.events.catalog:catalog",
        "List all message types with their subjects, publishers and subscribers.",
    ),
}

_TASK: Final[CommandTable] = {
    "new": Command(
        "fedbus.app.cli.commands.task:new",
        "Create a task: a small app that trains, with comments on all settings of fedbus.",
    ),
    "validate": Command(
        "fedbus.app.cli.commands.task:validate",
        "Validate a task; print one line per problem. The exit code is 0 if there is none.",
    ),
}

_PROVISION: Final[CommandTable] = {
    "init": Command(
        "fedbus.app.cli.commands.provision.members:init",
        "Create a federation: operator, account, signing keys, server credentials, certificates, nats.conf.",
    ),
    "client": Command(
        "fedbus.app.cli.commands.provision.members:client",
        "Create the credentials of a client, as a kit for FEDBUS_KIT.",
    ),
    "user": Command(
        "fedbus.app.cli.commands.provision.members:user",
        "Create the credentials of a user of the command line, as a kit for FEDBUS_KIT.",
    ),
    "key": Command(
        "fedbus.app.cli.commands.provision.device:key",
        "On a device: create a key pair and print the public key.",
    ),
    "complete": Command(
        "fedbus.app.cli.commands.provision.device:complete", "On a device: add its private key to its kit."
    ),
    "site": Command(
        "fedbus.app.cli.commands.provision.members:site",
        "Create a leaf node for a site: its clients connect to it, and it connects to the federation.",
    ),
    "certificate": Command(
        "fedbus.app.cli.commands.provision.members:certificate",
        "Create a certificate for another server of the federation: S3 or the dashboard.",
    ),
    "list": Command(
        "fedbus.app.cli.commands.provision.members:list_",
        "List all clients, sites, users and roles, with the state of their credentials.",
    ),
    "revoke": Command(
        "fedbus.app.cli.commands.provision.revocation:revoke",
        "Revoke credentials; nats-server closes the connections that use them.",
    ),
    "rotate": Command(
        "fedbus.app.cli.commands.provision.revocation:rotate",
        "Rotate a key, the server certificate, the CA or the device signing key.",
    ),
    "push": Command(
        "fedbus.app.cli.commands.provision.revocation:push",
        "Send the current credentials and revocations to nats-server.",
    ),
}

_EXPERIMENT: Final[CommandTable] = {
    "ls": Command("fedbus.app.cli.commands.experiment:ls", "List the experiments."),
    "delay": Command(
        "fedbus.app.cli.commands.experiment:delay",
        "Measure the time of a run under delays, and with the modes deadline and buffered.",
    ),
    "heterogeneity": Command(
        "fedbus.app.cli.commands.experiment:heterogeneity",
        "Measure local and global accuracy with IID, imbalanced and skewed data, for four algorithms.",
    ),
    "devices": Command(
        "fedbus.app.cli.commands.experiment:devices",
        "Measure the time of rounds with three groups of unequal devices.",
    ),
    "continual": Command(
        "fedbus.app.cli.commands.experiment:continual",
        "Run five runs in a row, and check that each begins with the loss that the last one ended with.",
    ),
    "compare": Command(
        "fedbus.app.cli.commands.experiment:compare",
        "Compare two strategies or configurations on the same partitions and seeds, with confidence intervals.",
    ),
}

COMMANDS: Final[CommandTable] = {
    "demo": Command(
        "fedbus.app.cli.commands.demo:demo",
        "Train, serve and retrain a federated model on this machine, with real data.",
    ),
    "simulate": Command(
        "fedbus.app.cli.commands.simulate:simulate",
        "Simulate a task with virtual clients on this machine: the same app as on a fleet.",
    ),
    "up": Command(
        "fedbus.app.cli.commands.up:up",
        "Start NATS, the server side and clients on this machine; they run until Ctrl-C.",
    ),
    "experiment": Group("Run the experiments of the papers, and compare two algorithms.", _EXPERIMENT),
    "run": Group("List, start, watch and stop training runs.", _RUN),
    "clients": Group("List and show clients: states, models, rounds and devices.", _CLIENTS),
    "top": Command(
        "fedbus.app.cli.commands.top:top",
        "Show servers, runs and clients live: states, models, load, last report, and why a client does not train.",
    ),
    "why": Command(
        "fedbus.app.cli.commands.why:why",
        "Show what a client does now, and why it does not take part in runs.",
    ),
    "trace": Command(
        "fedbus.app.cli.commands.trace:trace", "Draw the spans of a run, and show what each round waited for."
    ),
    "verify": Command(
        "fedbus.app.cli.commands.verify:verify",
        "Show and verify the code, configuration, clients and updates of a run's model.",
    ),
    "model": Group("List, compare, verify, promote and export model versions.", _MODEL),
    "code": Group("Show, roll out and revert the versions of a task's code.", _CODE),
    "data": Group(
        "List and export captured rows of clients on this machine; divide data sets among clients.", _DATA
    ),
    "profile": Group("Show and check profiles: delays, bandwidth, losses and absences of clients.", _PROFILE),
    "events": Group("Show, replay and decode messages.", _EVENTS),
    "task": Group("Create and validate tasks.", _TASK),
    "server": Group(
        "Run the server side of tasks.",
        {
            "up": Command(
                "fedbus.app.cli.commands.run_agents:server_up",
                "Run the four agents of the server side of each task in this process.",
            )
        },
    ),
    "client": Group(
        "Run a client.",
        {
            "up": Command(
                "fedbus.app.cli.commands.run_agents:client_up",
                "Run the four agents of a client in this process, for each of its tasks.",
            )
        },
    ),
    "agent": Command(
        "fedbus.app.cli.commands.run_agents:agent",
        "Run one agent, or several agents of one side, in this process.",
    ),
    "gateway": Command(
        "fedbus.app.cli.commands.gateway:gateway",
        "Serve the dashboard in a browser: clients, runs, models, events and schedules, live.",
    ),
    "provision": Group("Manage the keys, credentials and certificates of a federation.", _PROVISION),
    "context": Command(
        "fedbus.app.cli.commands.context:context",
        "Write a context for the `nats` command line: URL, credentials, CA and inbox prefix.",
    ),
    "doctor": Command(
        "fedbus.app.cli.commands.doctor:doctor",
        "Check this machine and its NATS connection; print how to fix each problem.",
    ),
    "version": Command(
        "fedbus.app.cli.commands.version:version", "Print version information for bug reports."
    ),
}
