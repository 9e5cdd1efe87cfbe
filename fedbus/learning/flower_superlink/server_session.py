"""The server side of a run over a SuperLink: it starts the SuperLink, and runs the ServerApp in this process."""

import tempfile
from pathlib import Path

import structlog

from fedbus.learning.flower import task_code
from fedbus.learning.flower.replies import GridClosed
from fedbus.learning.flower.server_app_host import ServerAppFailed, run_server_app
from fedbus.learning.flower_superlink.bundle import build_bundle
from fedbus.learning.flower_superlink.fleet import SuperNodes
from fedbus.learning.flower_superlink.grid import SuperLinkGrid
from fedbus.learning.flower_superlink.private_api import SuperLinkError
from fedbus.learning.flower_superlink.superlink import SuperLink
from fedbus.learning.library import Messenger, OnRound, ServerJob
from fedbus.learning.weights import Arrays

log = structlog.get_logger("fedbus.learning")


class SuperLinkServer:
    """The server side of one run. Raises BadTask if the ServerApp cannot be loaded."""

    def __init__(self, job: ServerJob) -> None:
        self._job = job
        self._app = task_code.load_server_app(job.path, job.task.app["serverapp"])

    def run(self, messenger: Messenger, on_round: OnRound) -> Arrays | None:
        """Run the ServerApp over a SuperLink to its end, and return the final model.

        Raises:
            SuperLinkEnded: the SuperLink ended during the run. fedbus recovers the run, with a new SuperLink.
            TrainingFailed: the SuperLink cannot listen, too few SuperNodes connect, or the ServerApp raised.

        """
        with (
            tempfile.TemporaryDirectory(prefix="fedbus-superlink-") as directory,
            SuperLink(self._job.task.table.superlink, Path(directory)) as link,
        ):
            nodes = SuperNodes(messenger, link)
            try:
                grid = link.start_run(build_bundle(self._job.task.id, self._job.config))
                app_grid = SuperLinkGrid(grid, messenger, link, nodes)
                app_grid.wait_for_nodes(self._job.plan.quorum)
                final = run_server_app(self._app, app_grid, self._job, on_round)
            except (GridClosed, ServerAppFailed, SuperLinkError):
                link.check_running()
                raise
            finally:
                nodes.close()
            try:
                link.finish_run()
            except SuperLinkError as error:
                log.warning("SuperLink not informed of the end of the run", reason=str(error))
            return final

    def close(self) -> None:
        """Do nothing: `run` ends the SuperLink."""
