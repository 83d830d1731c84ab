"""File work beside a loop that may not wait: a shared file system can hang for ever."""

import threading
from collections.abc import Callable
from typing import Any


def beside(call: Callable[..., Any], *arguments: Any, otherwise: Any = None) -> Any:
    """Call something that touches files in a thread, and go on without it when the file system hangs or refuses."""
    result = [otherwise]

    def run() -> None:
        try:
            result[0] = call(*arguments)
        except OSError:
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(2.0)
    return result[0]
