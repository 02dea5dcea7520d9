"""``python -m distfl`` is the ``distfl`` command."""

import sys

from distfl.allocator import restart_prepared
from distfl.signals import StopRequest, hold_signals


def main() -> int:
    """The command with its signals handled from the first moment; returns the exit code."""
    stop = None
    if sys.argv[1:2] == ["train"]:  # before everything that takes time to import
        hold_signals()
        restart_prepared()
        stop = StopRequest()
    elif sys.argv[1:2] == ["calibrate"]:
        restart_prepared()
    try:
        from distfl import cli

        return cli.main(stop=stop)
    except KeyboardInterrupt:  # nothing has begun that could be continued, or it has said so itself
        print("distfl: interrupted", file=sys.stderr, flush=True)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
