"""Failover between the byte sources of a file: which one to use next, when to wait, and when to give up."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from qwenlocal.errors import DownloadFailed, SourceUnreachable
from qwenlocal.i18n import tr
from qwenlocal.library.artifact import DownloadPolicy
from qwenlocal.library.byte_source import ByteSource
from qwenlocal.library.http import TransferError

_MAX_BACKOFF = 30.0
_SET_ASIDE = "set aside: it may have sent wrong bytes"  # while another source is used alone
_SUCCESS_SIZE = 64 << 10  # bytes; a connection that delivers as much and breaks is worth another one


@dataclass(eq=False)
class SourceState:
    """The history of one source in this download."""

    source: ByteSource
    failures: int = 0
    arrived: int = 0  # bytes since the last success
    paused_until: float = 0.0
    disabled: str = ""  # the reason, if the source is not used any more
    last_error: TransferError | None = None
    was_sole_source: bool = False


class SourceSelector:
    """The sources of one file, used in order of preference; failing ones back off exponentially. Thread-safe."""

    def __init__(self, name: str, sources: Sequence[ByteSource], policy: DownloadPolicy) -> None:
        self._name, self._policy = name, policy
        self.states = [SourceState(source) for source in sources]
        self._lock = threading.Lock()
        self._last_success: float | None = None
        self._started = time.monotonic()

    def select(self) -> tuple[SourceState | None, float]:
        """
        Return a source to use now, or None and the seconds to wait.

        Raises
        ------
        DownloadFailed, SourceUnreachable: no source is left, or none has delivered for too long.
        """
        with self._lock:
            now = time.monotonic()
            enabled = [state for state in self.states if not state.disabled]
            ready = [state for state in enabled if state.paused_until <= now]
            if ready:
                return ready[0], 0.0
            if not enabled:
                raise self._failure()
            wait = min(state.paused_until for state in enabled) - now
            idle = now - (self._started if self._last_success is None else self._last_success)
            nothing_reached = self._last_success is None and _all_unreachable(enabled)
            if idle + wait > (self._policy.first_patience if nothing_reached else self._policy.patience):
                raise self._failure()
            return None, wait

    def record_arrival(self, state: SourceState, count: int) -> None:
        """Count bytes that a source delivered; enough of them are a success, which resets its back-off."""
        with self._lock:
            state.arrived += count
            if state.arrived >= _SUCCESS_SIZE:
                state.failures, state.arrived, self._last_success = 0, 0, time.monotonic()

    def record_failure(self, state: SourceState, error: TransferError) -> None:
        """Pause a source after a failure, or disable it if a retry cannot help."""
        with self._lock:
            state.last_error = error
            if not error.retryable:
                state.disabled = str(error)
                return
            now = time.monotonic()
            if now < state.paused_until and not error.retry_after:
                return  # several threads see the same failure; count it once
            state.failures += 1
            pause = error.retry_after or min(_MAX_BACKOFF, 0.5 * 2 ** (state.failures - 1))
            state.paused_until = max(state.paused_until, now + pause)

    def select_sole_source(self, senders: Collection[SourceState]) -> SourceState | None:
        """
        Choose one source to deliver everything alone, and set the others aside; None if each was tried alone.

        Used after a digest mismatch: if several sources sent parts, it is unknown which one sent wrong bytes.
        """
        if len(senders) == 1:
            next(iter(senders)).was_sole_source = True
        untried = (state for state in self.states if not state.was_sole_source)
        chosen = next((state for state in untried if state.disabled in ("", _SET_ASIDE)), None)
        if chosen is None:
            return None
        for state in self.states:
            state.disabled = state.disabled or _SET_ASIDE
        chosen.was_sole_source, chosen.disabled = True, ""
        return chosen

    def _failure(self) -> DownloadFailed:
        reasons = [f"{s.source.label}: {s.disabled or s.last_error or 'not tried'}" for s in self.states]
        if self._last_success is None and _all_unreachable(self.states):
            return SourceUnreachable(self._name, reasons)
        waits = [s.last_error.retry_after for s in self.states if s.last_error and s.last_error.retry_after]
        hint = (
            tr("Try again in {seconds:.0f} s.", seconds=max(waits))
            if waits
            else tr("To continue the download, run the same command again.")
        )
        return DownloadFailed(
            f"{self._name} could not be downloaded ({'; '.join(reasons) or 'no source has it'}).", hint=hint
        )


def _all_unreachable(states: Sequence[SourceState]) -> bool:
    return all(state.last_error is not None and state.last_error.unreachable for state in states)
