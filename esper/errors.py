"""The exceptions that a user sees as a sentence instead of a traceback."""


class UserError(ValueError):
    """What was given, what is accepted, what to do: one sentence for the person who sees it.

    The command line prints it alone and exits with code 2; as a library it is an ordinary ``ValueError``.
    """


class TrackerError(RuntimeError):
    """The story of a run could not be kept; the run itself went on. The command line prints it alone, exit code 1."""
