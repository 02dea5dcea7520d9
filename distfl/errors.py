"""Every error distfl raises on purpose: what was asked, what was found, which setting to change.

Anything else that escapes is a programming error and aborts the whole job with its traceback.
"""

from __future__ import annotations

EXIT_REFUSED = 2  # bad input, refused before any rank trained
EXIT_REQUEUE = 75  # checkpointed on request (SIGUSR1); start again with --resume
EXIT_INTERRUPTED = 130  # Ctrl-C, as a shell says it: 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # nobody reads what is printed: 128 + SIGPIPE


class DistflError(Exception):
    """Base of the family.

    Args:
        asked: what the user or caller asked for.
        found: what stands in the way, with the values found.
        change: the setting or action that mends it.
    """

    def __init__(self, asked: str, found: str, change: str):
        super().__init__(asked, found, change)
        self.asked, self.found, self.change = asked, found, change

    def __str__(self) -> str:
        return f"{type(self).__name__}\n  asked:  {self.asked}\n  found:  {self.found}\n  change: {self.change}"


class ConfigError(DistflError):
    """A config file, override or command-line value that cannot be used."""


class DataError(DistflError):
    """A corpus, column or partition that cannot be had."""


class FamilyError(DistflError):
    """A family folder or pretrained model that is missing, incomplete or of another shape."""


class PlanError(DistflError):
    """Budgets that admit no plan."""


class CapError(DistflError):
    """A memory cap that cannot be imposed or cannot be proven."""


class NotFinite(DistflError):
    """A client's loss or update is not finite: a result of the round, not a crash."""


class StartError(DistflError):
    """A rank that cannot do its part, found before any rank trained."""


class WireError(DistflError):
    """A message that is garbled, cut short, stale or of somebody else; a client whose update it is, is left out."""


class TransportError(DistflError):
    """The launch does not fit: too few ranks, ranks that cannot see each other, missing MPI."""


class RankLost(DistflError):
    """A connection to another rank broke: that one has ended, and has said why if it could.

    Args:
        purpose: of the transfer in which it was seen, as the ledger names it.

    ``answered`` has the ranks, by their numbers at the start, whose part in that transfer had come.
    """

    def __init__(self, asked: str, found: str, change: str, purpose: str = ""):
        super().__init__(asked, found, change)
        self.purpose, self.answered = purpose, frozenset()


class CheckpointError(DistflError):
    """A run folder or checkpoint that cannot be continued from."""
