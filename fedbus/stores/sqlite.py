"""Opening a file of SQLite's that is ours alone, so that what is wrong with it is told as of every store."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

from fedbus.stores.errors import REMEDY_RESTORE_OR_MOVE, StoreCorrupt, StoreUnavailable


def open_database(path: Path, prepare: Callable[[sqlite3.Connection], object]) -> sqlite3.Connection:
    """The database at *path*, made where there is none, for any thread; *prepare* makes its tables.

    A write waits for the kernel and not for the platter, as SQLite has it for ``synchronous = NORMAL`` with a WAL.
    Raises StoreUnavailable, and StoreDamaged where the file is none of SQLite's.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.OperationalError) as error:
        raise StoreUnavailable(path, error) from error
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        prepare(connection)
    except sqlite3.OperationalError as error:
        connection.close()
        raise StoreUnavailable(path, error) from error
    except sqlite3.DatabaseError as error:
        connection.close()
        raise StoreCorrupt(path, error, remedy=REMEDY_RESTORE_OR_MOVE) from error
    return connection
