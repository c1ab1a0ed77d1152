"""A model at an OpenAI-compatible endpoint as the judge, weighted by the probabilities of its first token.

The model gets the same prompt and request as AlpacaEval 2.0's own judge, alpaca-eval's weighted_alpaca_eval_gpt4_turbo.
"""

import hashlib
import json
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event
from typing import Any

import openai
from tqdm import tqdm

from stages.artifacts import files
from stages.runtime import scratch
from stages.runtime.errors import StageError, one_line
from stages.runtime.logs import log
from stages.runtime.params import EvaluateAlpaca

PROMPT = "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
"""The prompt, in alpaca-eval's evaluators_configs: it asks which output is better, m (the first) or M."""

REQUEST: dict[str, Any] = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "logprobs": True, "top_logprobs": 5}
"""The parameters of every request, those of weighted_alpaca_eval_gpt4_turbo."""

OPENAI = "https://api.openai.com/v1"
RETRIES = 12
"""Retries after a rate limit, a server error or a lost connection, 0.5 to 8 seconds apart: about a minute in total."""
TIMEOUT = 300
"""Seconds that one request may take."""
CHARACTERS_PER_TOKEN = 4
"""A rough average for English: the estimated cost needs no tokenizer."""
SHORTEST_SECRET = 8
"""Characters. A shorter key is a placeholder for a server without keys, and may be a word of ordinary text."""

Choice = dict[str, Any]
"""A choice of a chat completion, with `total_tokens`; or only `error`, the reason why there is none."""


class EndpointJudge:
    """Asks a model which output is better. `complete` is alpaca-eval's completion function.

    Usable answers are written to the scratch folder as they arrive, one file each, and never requested again.
    Raises StageError if OPENAI_API_KEY is not set.
    """

    def __init__(self, section: EvaluateAlpaca, *, retries: int = RETRIES, timeout: float = TIMEOUT) -> None:
        """section: evaluate_alpaca of params.yaml. retries: per request. timeout: seconds, per attempt."""
        key = os.environ.get("OPENAI_API_KEY")
        if not key:
            raise StageError(
                f"evaluate_alpaca.judge: {section.judge} is called over the network: set OPENAI_API_KEY (to any value for a "
                "server that you started without a key, such as vLLM)"
            )
        self.section = section
        self.base_url = section.base_url or OPENAI
        self._key = key
        self._client = openai.OpenAI(api_key=key, base_url=self.base_url, max_retries=retries, timeout=timeout)
        self._stopped = Event()  # set once the endpoint has failed, so that requests still in the queue are not sent
        logging.getLogger("openai").setLevel(logging.INFO)  # it logs retries, which explain a pause
        determines_answers = json.dumps([section.judge, self.base_url, REQUEST])
        self.folder = scratch.FOLDER / "evaluate-alpaca" / hashlib.sha256(determines_answers.encode()).hexdigest()[:16]

    def complete(self, prompts: list[str], **_: Any) -> dict[str, list[Any]]:
        """Return the model's choice for each prompt and its price in dollars (NaN if unknown), as alpaca-eval expects.

        Prompts without a usable answer are sent once more. Raises StageError if the endpoint refuses a request, or still
        fails after all retries, or if no answer is usable.
        """
        paths = {prompt: self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.json" for prompt in prompts}
        pending = {prompt: path for prompt, path in paths.items() if not path.exists()}
        if pending:
            self._announce(list(pending), len(paths))
        unusable = self._ask_all(pending)
        unusable = self._ask_all({prompt: paths[prompt] for prompt in unusable})
        self._report_unusable(list(unusable.values()), len(paths))
        choices = [unusable[prompt] if prompt in unusable else files.read_json(paths[prompt]) for prompt in prompts]
        price = math.nan if self.section.price_per_million_tokens is None else self.section.price_per_million_tokens / 1e6
        prices = [(choice.get("total_tokens") or math.nan) * price for choice in choices]
        return {"completions": choices, "price_per_example": prices}

    def ask(self, prompt: str) -> Choice:
        """Send one prompt and return the first choice, redacted. Raises openai.APIError if the endpoint fails."""
        try:
            reply = self._client.chat.completions.create(model=self.section.judge, messages=to_messages(prompt), **REQUEST)
            choice: Choice = json.loads(self.redact(json.dumps(reply.choices[0].model_dump())))
            return choice | {"total_tokens": reply.usage.total_tokens if reply.usage else None}
        except (AttributeError, IndexError, TypeError, ValueError, openai.APIResponseValidationError) as error:
            return {"error": f"not a chat completion: {type(error).__name__}"}
        except openai.APIError as error:
            if error.code in ("content_filter", "invalid_prompt"):  # concerns this pair of outputs only
                return {"error": error.code}
            raise

    def redact(self, text: str) -> str:
        """Replace the API key, which an endpoint may quote, in text that is logged or written to a file."""
        if len(self._key) < SHORTEST_SECRET:
            return text
        return text.replace(json.dumps(self._key)[1:-1], "...").replace(self._key, "...")

    def _ask_all(self, pending: dict[str, Path]) -> dict[str, Choice]:
        """Send prompts in parallel and write the usable answers to their paths. Returns the unusable ones by prompt."""
        if not pending:
            return {}
        pool = ThreadPoolExecutor(self.section.workers)
        tasks = {pool.submit(self._ask_and_keep, prompt, path): prompt for prompt, path in pending.items()}
        try:
            progress = tqdm(as_completed(tasks), desc=self.section.judge, total=len(tasks))
            choices = {tasks[task]: task.result() for task in progress}
        except openai.OpenAIError as error:
            reason = one_line(self.redact(f"{error} {error.__cause__ or ''}")).rstrip(".")
            raise StageError(
                f"the judge {self.section.judge} at {self.base_url} failed: {reason}: its answers so far are kept; "
                "re-run to resume"
            ) from None  # the cause's traceback could show the key
        finally:
            pool.shutdown(cancel_futures=True)
        return {prompt: choices[prompt] for prompt, path in pending.items() if not path.exists()}

    def _ask_and_keep(self, prompt: str, path: Path) -> Choice:
        if self._stopped.is_set():
            return {}
        try:
            choice = self.ask(prompt)
        except openai.APIError:
            self._stopped.set()
            raise
        if not math.isnan(parse_choice(choice)[0]):
            files.write_json(choice, path)
        return choice

    def _announce(self, pending: list[str], total: int) -> None:
        """Log how many requests will be sent and their estimated cost."""
        tokens = sum(map(len, pending)) / CHARACTERS_PER_TOKEN
        cost = "cost unknown (evaluate_alpaca.price_per_million_tokens is not set)"
        if self.section.price_per_million_tokens is not None:
            cost = f"{tokens * self.section.price_per_million_tokens / 1e6:.2f} dollars"
        requests = f"sending {len(pending)} requests ({total - len(pending)} answers kept)"
        log.info("%s: %s, about %.0f tokens, %s", self.section.judge, requests, tokens, cost)

    def _report_unusable(self, unusable: list[Choice], total: int) -> None:
        """Log unusable answers. Raises StageError if all are."""
        if not unusable:
            return
        message = (
            f"{len(unusable)} of {total} answers of {self.section.judge} have neither m nor M among their likeliest tokens: "
            f"{json.dumps(unusable[0])[:300]}"
        )
        if len(unusable) == total:
            raise StageError(f"{message}: choose another evaluate_alpaca.judge")
        log.warning(message)


def to_messages(prompt: str) -> list[Any]:
    """Convert AlpacaEval's ChatML prompt to two chat messages, system and user; ChatML tokens in an output remain text."""
    text = prompt.strip().removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>")
    system, user = text.split("<|im_end|>\n<|im_start|>user\n", 1)
    return [{"role": "system", "content": system.strip()}, {"role": "user", "content": user.strip()}]


def parse_choice(choice: Choice) -> list[float]:
    """Compute alpaca-eval's preference, from 1 (first output) to 2 (second), from the probabilities of m and M as first token.

    The preference is NaN if neither m nor M is among the likeliest tokens.
    """
    from alpaca_eval.completion_parsers import logprob_parser

    try:
        tokens = {entry["token"] for entry in choice["logprobs"]["content"][0]["top_logprobs"]}
        if not tokens & {"m", "M"}:
            return [math.nan]
        return [float(logprob_parser(choice, "m", ["m", "M"], is_binarize=False, log_prob_index=0)[0])]
    except (IndexError, KeyError, TypeError):
        return [math.nan]
