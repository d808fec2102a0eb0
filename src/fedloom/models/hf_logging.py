"""Silence for the libraries that talk to the console while they load and save."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

# PEFT imports bitsandbytes wherever it is installed, which then asks for kernels of the Hub that nothing here calls.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back warnings, log lines below an error and progress bars of transformers, peft, gguf and the Hub client."""
    hub = import_module("huggingface_hub.utils")  # its names are re-exported, which mypy refuses
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    hub_bars = not hub.are_progress_bars_disabled()
    loggers = {
        name: logging.getLogger(name) for name in ("huggingface_hub", "peft", "accelerate", "gguf")
    }
    levels = {name: logger.level for name, logger in loggers.items()}
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub.disable_progress_bars()
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if hub_bars:
            hub.enable_progress_bars()
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
