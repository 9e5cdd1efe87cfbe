"""The preparation of a worker, the same for every engine: threads of numerical libraries, and the import of the app."""

import sys
from types import ModuleType
from typing import Final

from fedbus.common.garbage_collection import rare_garbage_collections
from fedbus.contracts.task.app import LibraryUnusable
from fedbus.contracts.task.task import Task
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.library import BadTask
from fedbus.learning.task_code import format_error

ENVIRONMENT: Final = {
    **dict.fromkeys(
        (
            "OMP_NUM_THREADS",
            "OPENBLAS_NUM_THREADS",
            "MKL_NUM_THREADS",
            "NUMEXPR_NUM_THREADS",
            "VECLIB_MAXIMUM_THREADS",
        ),
        "1",
    ),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""The environment of a worker, which it must have when it starts.

Numerical libraries use one thread. glibc asks for huge pages, which saves page faults and address translations: a small
training takes 3 % less time. Other C libraries ignore that.
"""


def import_app(task: Task) -> str:
    """Import the client side of *task*. Return why that failed, or an empty text."""
    library = task.table.library
    try:
        open_library(library).check(task, server_side=False)
    except (BadTask, LibraryUnusable) as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - the engine reports it
        return f"the training library {library!r} failed: {format_error(error)}"
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
        _make_first_optimizer(torch)
    return ""


def _make_first_optimizer(torch: ModuleType) -> None:
    """Make the first optimizer of this process, which imports 800 modules of torch.

    After a fork, each worker would spend a second and 70 MB on that. The optimizer takes no step, since that could
    initialise CUDA, which forked workers could not use then.
    """
    with rare_garbage_collections():
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
