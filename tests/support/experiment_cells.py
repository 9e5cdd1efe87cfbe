"""Functions of cells for the tests of experiments; the processes of the cells import them."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from fedbus.simulation.experiments.cell_process import ReportProgress

REFERENCE = f"{__name__}:"


def double(settings: dict[str, Any], report_progress: ReportProgress) -> dict[str, Any]:
    print("the app prints")
    report_progress(0.5)
    return {"value": 2 * settings["value"], "process": os.getpid()}


def fail(settings: dict[str, Any], report_progress: ReportProgress) -> dict[str, Any]:
    raise ValueError(f"bad value {settings['value']}")


def return_nan(settings: dict[str, Any], report_progress: ReportProgress) -> dict[str, Any]:
    return {"value": float("nan")}


def die(settings: dict[str, Any], report_progress: ReportProgress) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def wait(settings: dict[str, Any], report_progress: ReportProgress) -> dict[str, Any]:
    Path(settings["started"]).write_text(str(os.getpid()))
    time.sleep(60)
    return {}
