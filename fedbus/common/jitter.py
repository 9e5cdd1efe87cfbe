"""Random jitter of pauses, from a generator of its own.

fedbus does not use Python's global generator: a run with a seed sets that for the app, whose results must not depend on
how often a process retried or reconnected.
"""

import random
from typing import Final

JITTER: Final = random.Random()  # noqa: S311 - no secret
"""Seed it to reproduce the pauses of a process: ``JITTER.seed(1)``."""
