"""``python -m fedbus``: the command line, or a process that an agent starts.

``python -m fedbus child WORK`` is a child process of an agent (see `fedbus.app.entrypoints.child`), and
``python -m fedbus job WORK`` the process of a Kubernetes Job (see `fedbus.app.entrypoints.kubernetes_job`). With these
arguments an agent starts a process without naming a module of `fedbus.app`.
"""

import sys

if __name__ == "__main__":
    match sys.argv[1:]:  # each process imports its own entry point alone
        case ["child", work]:
            from fedbus.app.entrypoints.child import main as run_child

            run_child(work)
        case ["job", work]:
            from fedbus.app.entrypoints.kubernetes_job import main as run_job

            run_job(work)
        case _:
            from fedbus.app.cli.main import main

            main()
