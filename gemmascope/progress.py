"""Long work: it can be stopped, and keeps what it has."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interruptible(kept: str | Callable[[], str]) -> Iterator[None]:
    """Ctrl-C (in Jupyter, "interrupt the kernel") ends the block, not the call: `kept` says what there is."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"Interrupted: {kept if isinstance(kept, str) else kept()}")
