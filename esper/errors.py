"""The exceptions that a user sees as a sentence instead of a traceback, and the two that a signal raises."""


class UserError(ValueError):
    """What was given, what is accepted, what to do: one sentence for the person who sees it.

    The command line prints it alone and exits with code 2; as a library it is an ordinary ``ValueError``.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where Ctrl-C would be, so that one way of ending cleanly serves both."""


class Preempted(KeyboardInterrupt):
    """SIGTERM after which everything was saved; its text is the command that goes on with the same bits."""


class Pruned(Exception):
    """A search has ended this run early, because its held-out metric fell behind that of others; what it has done is kept."""


class TrackerError(RuntimeError):
    """The story of a run could not be kept; the run itself went on. The command line prints it alone, exit code 1."""


class Removed(OSError):
    """The folder of a run went away while the run was under way; ``filename`` is that folder."""


class RankLost(RuntimeError):
    """Another process of this training is gone; the text names it. What was saved before stands.

    ``speaks``: whether it is for this process to say so, and not for another one that is left.
    """

    def __init__(self, text: str, speaks: bool = True) -> None:
        super().__init__(text)
        self.speaks = speaks
