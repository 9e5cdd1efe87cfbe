"""Open a SQLite database, with the errors of a store."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

from fedbus.stores.errors import REMEDY_RESTORE_OR_MOVE, StoreCorrupt, StoreUnavailable


def open_database(path: Path, prepare: Callable[[sqlite3.Connection], object]) -> sqlite3.Connection:
    """Open the database at *path*, created if it does not exist, for any thread; *prepare* creates the tables.

    A write does not wait for the disk: ``synchronous = NORMAL`` with a WAL.
    Raises StoreUnavailable, and StoreCorrupt if the file is not a SQLite database.
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
