"""Options of the commands that start agents: task, overrides, model repository, inference server."""

from typing import Annotated

import typer

TaskSource = Annotated[
    str,
    typer.Option(
        "--task",
        help="The task: a directory, or git+https://host/repo@branch#subdirectory=dir to follow its commits.",
        show_default="FEDBUS_TASK, or the working directory",
    ),
]


TaskSources = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="A task: a directory, or git+https://host/repo@branch#subdirectory=dir to follow "
        "its commits. Repeatable.",
        show_default="FEDBUS_TASK, or the working directory",
    ),
]


Label = Annotated[
    list[str] | None, typer.Option(help="Device label as key=value, e.g. site=lab. Repeatable.")
]


Rounds = Annotated[int | None, typer.Option(min=1, help="Rounds of each run. Overrides the task's.")]


Quorum = Annotated[
    int | None, typer.Option(min=1, help="Clients that a run waits for. Overrides the task's.")
]


Every = Annotated[
    str | None,
    typer.Option(help="Interval between two runs: 90s, 10m, 2h. Overrides the task's `every-s`."),
]


AtMost = Annotated[
    int | None,
    typer.Option(min=1, help="Maximum number of runs that the schedule starts. Overrides the task's."),
]


RunConfig = Annotated[str, typer.Option(help='Run configuration of the app: "lr=0.1 local-epochs=1".')]


NodeConfig = Annotated[
    str, typer.Option(help='Node configuration of the device: "partition-id=0 num-partitions=3", or JSON.')
]


Store = Annotated[
    str,
    typer.Option(
        help="The model repository: a directory, or s3://bucket/prefix?endpoint=….",
        show_default="FEDBUS_STORE",
    ),
]


StoreOrEmbedded = Annotated[
    str,
    typer.Option(
        "--store",
        help="The model repository: a directory, s3://bucket/prefix?endpoint=…, or s3 to start an S3 server on "
        "this machine.",
    ),
]


Profile = Annotated[
    str,
    typer.Option(
        "--profile",
        help="Apply a profile to the connection and the training: a YAML file or a built-in one (fedbus profile ls).",
    ),
]


ProfileGroup = Annotated[
    str | None,
    typer.Option(
        "--profile-group",
        help="The device's group in the profile.",
        show_default="by its name or by chance",
    ),
]


ProfileSeed = Annotated[
    int | None,
    typer.Option("--profile-seed", help="Seed of the profile's random values.", show_default="the profile's"),
]


Host = Annotated[str, typer.Option(help="Address of the inference server.")]


Port = Annotated[int, typer.Option(min=0, max=65535, help="Port of the inference server; 0: a free one.")]


Dashboard = Annotated[bool, typer.Option(help="Serve the dashboard to browsers on this machine.")]
