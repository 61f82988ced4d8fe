"""The log on the terminal: sentences; tracebacks are in the run's ``esper.log``."""

from __future__ import annotations

import logging


class Sentence(logging.Formatter):
    """The message of a record alone."""

    def format(self, record: logging.LogRecord) -> str:
        """``record``'s message, without the traceback that it may carry."""
        return record.getMessage()
