"""Ctrl-C while MindSpore computes: it takes SIGINT for itself, for good, and turns it into
SIGTERM.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from contextlib import contextmanager
from types import FrameType
from typing import Iterator, List, Optional

_WAKE = signal.SIGURG  # ignored by default


@contextmanager
def heard() -> Iterator[None]:
    """While inside, SIGINT comes to Python's handler, whatever MindSpore does.

    A thread waits for it; all others, MindSpore's too, inherit that they do not take it. So this
    has an effect only before MindSpore is imported, and in the main thread.
    """
    if "mindspore" in sys.modules or threading.current_thread() is not threading.main_thread():
        yield
        return
    ended = threading.Event()
    before = signal.signal(_WAKE, _do_nothing)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    listener = threading.Thread(target=_listen, args=(ended,), daemon=True)
    listener.start()
    try:
        yield
    finally:
        ended.set()
        if listener.ident is not None:
            signal.pthread_kill(listener.ident, signal.SIGINT)
        listener.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        signal.signal(_WAKE, before)


def _listen(ended: threading.Event) -> None:
    main = threading.main_thread().ident
    while True:
        signal.sigwait([signal.SIGINT])
        if ended.is_set() or main is None:
            return
        _thread.interrupt_main()
        signal.pthread_kill(main, _WAKE)  # out of a system call that waits


def _do_nothing(number: int, frame: Optional[FrameType]) -> None:
    """Python's own handler has been told already."""


def stopping_signals() -> List[signal.Signals]:
    """Those that end a run after a saved step. A hang-up that is to be ignored (nohup) is."""
    hang_up = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hang_up]
