"""A bar for work that takes long, and nothing for work that does not."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress

SECONDS = 3.0
"""What passes before a bar appears."""


@contextlib.contextmanager
def long_work(text: str, steps: int) -> Iterator[Callable[[], None]]:
    """Show how far some work has come on standard error, where that is a terminal.

    Args:
        text: What is done.
        steps: How many steps there are.

    Yields:
        What to call after each step. The bar appears once SECONDS have passed, and
        goes when the block ends.
    """
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True)
    task, began = bar.add_task(text, total=steps), time.monotonic()
    with contextlib.ExitStack() as stack:

        def step() -> None:
            bar.advance(task)
            late = time.monotonic() - began > SECONDS
            if late and console.is_terminal and not bar.live.is_started:
                stack.enter_context(bar)

        yield step
