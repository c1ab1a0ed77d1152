"""llm-blender, which lives in the past: what it takes to import it and to load a ranker with it."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Within the block llm-blender 0.0.2 can be imported under transformers 4.57, and loads without chatter."""
    import transformers.utils.hub

    transformers.utils.hub.TRANSFORMERS_CACHE = "unused"  # llm-blender imports the name, which transformers dropped
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
