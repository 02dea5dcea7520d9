"""SIGUSR1 as a request to stop. Imports next to nothing: the handler must be there before a signal can come."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def hold_signals() -> None:
    """Keep SIGUSR1 waiting until a ``StopRequest`` takes it, also across a restart of this process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have this process sent that signal when the thread that started it ends, so that no rank outlives its launcher."""
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(_PR_SET_PDEATHSIG, number)


class StopRequest:
    """Made true by SIGUSR1: checkpoint at the next round boundary and leave with the requeue code.

    Made first thing in a rank's life: a signal without a handler would end the process.
    """

    def __init__(self) -> None:
        self._requested = False
        signal.signal(signal.SIGUSR1, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})

    def _note(self, number: int, frame: object) -> None:
        self._requested = True

    def __call__(self) -> bool:
        return self._requested
