"""``python -m distfl`` is the ``distfl`` command."""

import sys

from distfl import forking
from distfl.signals import StopRequest, hold_signals


def main() -> int:
    """The command with its signals handled from the first moment; returns the exit code."""
    try:
        if sys.argv[1:2] in (["train"], ["compare"]):  # before everything that takes time to import
            hold_signals()
        if sys.argv[1:2] == ["train"] and forking.is_asked_for() and (code := forking.launch("distfl.__main__:run")) is not None:
            return code
    except KeyboardInterrupt:
        return _interrupted()
    if sys.argv[1:2] in (["train"], ["calibrate"]):
        from distfl.allocator import restart_prepared

        restart_prepared()
    return run()


def run() -> int:
    """The command in a process that was prepared for it."""
    stop = StopRequest() if sys.argv[1:2] in (["train"], ["compare"]) else None
    try:
        from distfl import cli

        return cli.main(stop=stop)
    except KeyboardInterrupt:  # nothing has begun that could be continued, or it has said so itself
        return _interrupted()


def _interrupted() -> int:
    print("distfl: interrupted", file=sys.stderr, flush=True)
    return 130


if __name__ == "__main__":
    raise SystemExit(main())
