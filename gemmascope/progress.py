"""Long work: it shows how far it is, can be stopped, and keeps what it has."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tqdm.auto import tqdm

_whole: ContextVar[tqdm | None] = ContextVar("whole", default=None)


@contextmanager
def bar(total: int | None, what: str, unit: str, progress: bool = True) -> Iterator[tqdm]:
    """A progress bar. Inside another one it is that one: its steps are steps of the whole, which says what runs."""
    whole = _whole.get()
    if whole is not None:
        whole.set_description(what)
        yield whole
        return
    with tqdm(total=total, desc=what, unit=unit, delay=1, leave=False, disable=not progress) as shown:
        token = _whole.set(shown)
        try:
            yield shown
        finally:
            _whole.reset(token)


@contextmanager
def interruptible(kept: str | Callable[[], str]) -> Iterator[None]:
    """Ctrl-C (in Jupyter, "interrupt the kernel") ends the block, not the call: `kept` says what there is."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"Interrupted: {kept if isinstance(kept, str) else kept()}")


@contextmanager
def all_or_nothing() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: for short ones that change several things which belong together."""
    if threading.current_thread() is not threading.main_thread():  # Ctrl-C comes to the main thread alone
        yield
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(*came[0])
