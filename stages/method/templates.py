"""Render chat templates, which are programs that come with a model, in a child process with limits of time and memory.

transformers renders them in Jinja's sandbox, which keeps them from files and from Python's internals, but not from endless
loops or from filling the memory. Rendering gives the same text at any time and on any machine: the date is fixed, and choices
at random are seeded.
"""

import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from stages.runtime import processes
from stages.runtime.errors import StageError, describe, quote

TODAY = datetime(2024, 7, 26)
"""The date that a template reads: what Llama 3.1's own template takes where it cannot read one."""
SECONDS = 10
"""Processor time for one prompt."""
MEMORY = 2**30
"""Bytes for a template, in addition to what this process has."""
ADDED = 100_000
"""The most characters that a template may add to a prompt."""
PROBE = "Which is larger, 7 x 191 or 1336?"
"""A prompt that no template contains by itself."""
OK, FAILED = b"+", b"-"
"""First byte of what the child process answers for a prompt, before the text or the problem, in UTF-8."""


def render_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Render one user message per prompt, and the assistant's header, with the chat template of a transformers tokenizer.

    Raises StageError if rendering fails, exceeds SECONDS, MEMORY or ADDED, or loses the text of a prompt.
    """
    return list(_answers(tokenizer, [PROBE, *prompts]))[1:]


def _answers(tokenizer: Any, prompts: Sequence[str]) -> Iterator[str]:
    """Yield the rendered prompts from a child process, a fork of this one: it need not import anything again."""
    context = multiprocessing.get_context("fork")
    answers, questions_end = context.Pipe(duplex=False)
    child = context.Process(target=_render_all, args=(questions_end, tokenizer, prompts), daemon=True)
    child.start()
    questions_end.close()  # so that the child's end is the end of its answers
    try:
        for prompt in prompts:
            try:
                answer = answers.recv_bytes()
            except EOFError:
                child.join()
                answer = FAILED + _explain_exit(child.exitcode).encode()
            if answer[:1] != OK:
                raise StageError(
                    f"the chat template of {tokenizer.name_or_path} {answer[1:].decode()}, on the prompt {quote(prompt)}: fix "
                    "the template, or use another chat model"
                )
            yield answer[1:].decode()
    finally:
        child.kill()
        child.join()
        answers.close()


def _explain_exit(code: int | None) -> str:
    if code == -signal.SIGPROF:
        return f"takes more than {SECONDS} s"
    return f"ends the process that renders it (exit code {code})"


def _render_all(answers: Connection, tokenizer: Any, prompts: Sequence[str]) -> None:
    """Answer each prompt in the child process, until one fails."""
    processes.setup_worker()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the stage ends this one
    os.environ["TZ"] = "UTC"
    time.tzset()
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for prompt in prompts:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # then the kernel ends the process, even within one call of C code
        try:
            answers.send_bytes(OK + _render(tokenizer, prompt).encode())
        except MemoryError:
            answers.send_bytes(FAILED + f"needs more than {MEMORY >> 20} MiB of memory".encode())
            return
        except Exception as error:  # a template may raise any
            answers.send_bytes(FAILED + f"fails on a single user message ({describe(error)})".encode(errors="replace"))
            return


def _render(tokenizer: Any, prompt: str) -> str:
    """Render one prompt in this process. Raises ValueError if the result does not contain the prompt."""
    random.seed(0)  # Jinja has a filter that chooses at random
    messages = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, strftime_now=TODAY.strftime)
    if prompt.strip() not in text:  # templates may trim it
        raise ValueError("the text that it renders does not contain the prompt's: it may expect content in parts")
    if len(text) > len(prompt) + ADDED:
        raise ValueError(f"the text that it renders is more than {ADDED} characters longer than the prompt")
    return text
