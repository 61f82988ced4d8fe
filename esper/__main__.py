"""``python -m esper`` is the console script ``esper``."""

import sys


def run() -> int:
    """The command line. Ctrl-C ends it in words from the first import on."""
    try:
        from esper.app import main
    except KeyboardInterrupt:
        print("esper: ended by Ctrl-C", file=sys.stderr)
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(run())
