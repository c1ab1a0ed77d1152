"""Logging to stderr, without third-party chatter."""

import logging
import os
import sys
import warnings

from stages.runtime.errors import escape_controls

log = logging.getLogger("stages")


def setup_logging(online: bool = False) -> None:
    """Log to stderr, turn telemetry off, and keep the Hugging Face libraries offline unless `online`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_escape_message)
    log.setLevel(logging.INFO)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for category in (FutureWarning, DeprecationWarning):  # third-party deprecation noise
        warnings.filterwarnings("ignore", category=category)
    if not online:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"


def _escape_message(record: logging.LogRecord) -> bool:
    """Escape control characters in a log record, whose text may be others', except for its line breaks and tabs."""
    lines = record.getMessage().expandtabs().split("\n")
    record.msg, record.args = "\n".join(map(escape_controls, lines)), None
    return True
