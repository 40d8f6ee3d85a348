"""transformers without its progress bars and advice."""

from __future__ import annotations

import contextlib
import logging
from typing import Any


@contextlib.contextmanager
def quiet() -> Any:
    """Keep transformers' progress bars and advice out of the tests' output."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        hf_logging.enable_progress_bar()
