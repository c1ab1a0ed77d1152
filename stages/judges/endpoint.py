"""A model at an OpenAI-compatible endpoint as the judge, weighted by the probabilities of its first token.

The model gets the same prompt and request as AlpacaEval 2.0's own judge, alpaca-eval's weighted_alpaca_eval_gpt4_turbo, as far
as it takes that request: see FORMS.

A fault of one pair, such as outputs that are too long for the judge, leaves that pair without a preference, and is counted.
What concerns all pairs, such as a wrong key or a server that is down, ends the stage; so do faults of too many pairs: see
MOST_FAILED.
"""

import hashlib
import json
import logging
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event, Lock
from typing import Any, NamedTuple

import httpx
import openai
from tqdm import tqdm

from stages.runtime import durable, scratch
from stages.runtime.errors import StageError, one_line, quote
from stages.runtime.logs import log
from stages.runtime.params import EvaluateAlpaca

PROMPT = "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
"""The prompt, in alpaca-eval's evaluators_configs: it asks which output is better, m (the first) or M."""

REQUEST: dict[str, Any] = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "logprobs": True, "top_logprobs": 5}
"""The parameters of every request, those of weighted_alpaca_eval_gpt4_turbo."""


class Form(NamedTuple):
    """How a model takes REQUEST and the prompt."""

    limit: str
    """The name of REQUEST's max_tokens: newer models of OpenAI refuse that one."""
    system: bool
    """Whether the system message is a message of its own: the templates of Gemma and others refuse that role."""


FORMS = [Form(limit, system) for system in (True, False) for limit in ("max_tokens", "max_completion_tokens")]
"""The first is alpaca-eval's; the others are tried in this order if a model refuses it before it has answered any pair."""
FORM_REFUSED = (400, 422)
"""HTTP statuses of a request that has a form which the model does not take, or that is too long for the model."""
REFUSED = (*FORM_REFUSED, 413)
"""HTTP statuses that may concern one request: those above, and length."""
ADDRESS = "set evaluate_alpaca.base_url to where its server speaks OpenAI's protocol, usually a path that ends in /v1"
MOVED = (301, 302, 303, 307, 308)
CONCERN_ALL = (*MOVED, 401, 402, 404, 405)
"""HTTP statuses that concern all requests, unless one has been answered. 403 may also be moderation of a single one."""
REMEDIES = {
    **dict.fromkeys((*MOVED, 405), ADDRESS),
    401: "set OPENAI_API_KEY to a key that this server knows, and correct or unset OPENAI_ORG_ID and OPENAI_PROJECT_ID",
    402: "pay into the account that OPENAI_API_KEY belongs to",
    404: f"set evaluate_alpaca.judge to a model that its server has, or {ADDRESS}",
    403: "set OPENAI_API_KEY to a key that may use this model, or choose another evaluate_alpaca.judge",
    429: "lower evaluate_alpaca.workers, or raise the limits of the account",
}
"""HTTP status that ends the stage -> what helps; of others, only waiting."""
FILTERS = ("content_filter", "invalid_prompt")
"""Error codes of OpenAI and Azure that concern the text of one request."""
MOST_FAILED = 0.5
"""The largest share of pairs that may be left without a preference."""

OTHERS = 5
"""How many other pairs to ask for, if none is answered yet, to tell the fault of a pair from that of the endpoint."""

OPENAI = "https://api.openai.com/v1"
RETRIES = 12
"""Retries after a rate limit, a server error or a lost connection, 0.5 to 8 seconds apart: about a minute in total."""
TIMEOUT = 300
"""Seconds that one request may take."""
CHARACTERS_PER_TOKEN = 4
"""A rough average for English: the estimated cost needs no tokenizer."""
SHORTEST_SECRET = 8
"""Characters. A shorter key is a placeholder for a server without keys, and may be a word of ordinary text."""
MOST_TOKENS = 10**9
"""More than any request has: a server that says so is wrong."""
SENT = ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID")
"""Environment variables that the client sends as headers."""
CONNECTION = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
"""Environment variables, in capitals, that say how to connect to an endpoint."""
NOT_FINITE = {"-Infinity": -9999.0, "Infinity": None, "NaN": None}
"""Numbers that some servers write and JSON lacks -> their replacement. vLLM, too, writes -9999 as the logarithm of 0."""

Choice = dict[str, Any]
"""A choice of a chat completion, with `total_tokens`; or only `error`, the reason why there is none, or `refused`, the HTTP
status, or the kind of error, that this request gets instead of an answer."""


class EndpointJudge:
    """Asks a model which output is better. `complete` is alpaca-eval's completion function.

    Usable answers are written to the scratch folder as they arrive, one file each, and never requested again.
    Raises StageError if OPENAI_API_KEY is not set or could be in evaluate_alpaca.base_url, if one of SENT cannot be sent, or if
    one of CONNECTION cannot be used.
    """

    def __init__(self, section: EvaluateAlpaca, *, retries: int = RETRIES, timeout: float = TIMEOUT) -> None:
        """section: evaluate_alpaca of params.yaml. retries: per request. timeout: seconds, per attempt."""
        self.section = section
        self.base_url = check_url(section.base_url or OPENAI)
        self._key = read_key(section.judge)
        self._client = connect(api_key=self._key, base_url=self.base_url, max_retries=retries, timeout=timeout)
        self._stopped = Event()  # set once the endpoint has failed, so that requests still in the queue are not sent
        self._lock = Lock()  # guards the attributes below
        self._form: Form | None = None  # the one that the model has answered
        self._answered: str | None = None  # a prompt with an answer
        self._failed = 0  # how many pairs are without a preference so far
        self._reason = ""  # why the last refused request was refused, in the endpoint's words, which may differ every time
        self._text = ""  # the start of the last text that came in place of a chat completion
        logging.getLogger("openai").setLevel(logging.INFO)  # it logs retries, which explain a pause
        determines_answers = json.dumps([section.judge, self.base_url, REQUEST])
        self.folder = scratch.FOLDER / "evaluate-alpaca" / hashlib.sha256(determines_answers.encode()).hexdigest()[:16]

    def complete(self, prompts: list[str], **_: Any) -> dict[str, list[Any]]:
        """Return the model's choice for each prompt and its price in dollars (NaN if unknown), as alpaca-eval expects.

        An answer without a preference is requested once more. Raises StageError if the endpoint fails, still after all retries,
        for any pair, or if more than MOST_FAILED of the pairs have no preference.
        """
        paths = {prompt: self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.json" for prompt in prompts}
        kept = {prompt: durable.read_json(path, check_kept) for prompt, path in paths.items()}
        choices: dict[str, Choice] = {prompt: choice for prompt, choice in kept.items() if choice}
        pending = [prompt for prompt in paths if prompt not in choices]
        if pending:
            self._announce(pending, len(paths))
        self._answered = next(iter(choices), None)
        choices |= self._ask_all(pending, paths)
        choices |= self._ask_all([prompt for prompt in failed(choices) if "refused" not in choices[prompt]], paths)
        self._report_failed([choices[prompt] for prompt in failed(choices)], len(paths))
        price = math.nan if self.section.price_per_million_tokens is None else self.section.price_per_million_tokens / 1e6
        prices = [(choices[prompt].get("total_tokens") or math.nan) * price for prompt in prompts]
        return {"completions": [choices[prompt] for prompt in prompts], "price_per_example": prices}

    def ask(self, prompt: str) -> Choice:
        """Send one prompt, in each of FORMS until the model has answered in one of them, and return the first choice, redacted.

        Raises openai.APIError if the endpoint fails for another reason than this request.
        """
        for form in [self._form] if self._form else FORMS:
            try:
                choice = self._send(self._client, prompt, form)
            except openai.APIStatusError as error:
                if error.status_code not in REFUSED and error.code not in FILTERS:
                    raise
                refusal = self._refuse(error)
                if error.status_code not in FORM_REFUSED or error.code in FILTERS:
                    break
            else:
                if is_usable(choice):
                    self._remember(prompt, form)
                return choice
        return refusal

    def redact(self, text: str) -> str:
        """Replace the API key, which an endpoint may quote, in text that is logged or written to a file."""
        if len(self._key) < SHORTEST_SECRET:
            return text
        for key in (json.dumps(self._key)[1:-1], repr(self._key)[1:-1], self._key):
            text = text.replace(key, "...")
        return text

    def _send(self, client: openai.OpenAI, prompt: str, form: Form) -> Choice:
        """Send one prompt and return the first choice, redacted. Raises openai.APIError."""
        reply: Any = None
        request = {form.limit if name == "max_tokens" else name: value for name, value in REQUEST.items()}
        try:
            reply = client.chat.completions.create(
                model=self.section.judge, messages=to_messages(prompt, system=form.system), **request
            )
            text = json.dumps(reply.choices[0].model_dump(warnings=False), ensure_ascii=False).encode(errors="replace").decode()
            choice: Choice = json.loads(self.redact(text), parse_constant=NOT_FINITE.get)
            tokens = getattr(reply.usage, "total_tokens", None)
            return choice | {"total_tokens": tokens if is_count(tokens) else None}
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError, openai.APIResponseValidationError) as error:
            text = error.doc if isinstance(error, json.JSONDecodeError) else reply
            with self._lock:
                self._text = f", as in {quote(self.redact(text))}" if isinstance(text, str) else ""
            return {"error": f"not a chat completion: {type(error).__name__}"}

    def _remember(self, prompt: str, form: Form) -> None:
        """Remember the prompt and the form of an answer."""
        with self._lock:
            self._answered = prompt
            if self._form is None and form != FORMS[0]:
                role = "" if form.system else ", and the system message as the start of the user's"
                log.info("%s refuses AlpacaEval's own request: sending %s%s", self.section.judge, form.limit, role)
            self._form = self._form or form

    def _refuse(self, error: openai.APIError) -> Choice:
        """Return the choice for a request that gets no answer, and remember why."""
        with self._lock:
            self._reason = self._quote(error)
        return {"refused": f"HTTP {error.status_code}" if isinstance(error, openai.APIStatusError) else type(error).__name__}

    def _quote(self, error: openai.OpenAIError) -> str:
        return one_line(self.redact(f"{error} {error.__cause__ or ''}")).rstrip(".")

    def _ask_all(self, pending: list[str], paths: dict[str, Path]) -> dict[str, Choice]:
        """Send prompts in parallel, write the usable answers to their paths, and return all answers by prompt.

        paths: those of all pairs. Raises StageError as `complete` does.
        """
        if not pending:
            return {}
        self._failed = 0
        pool = ThreadPoolExecutor(self.section.workers)
        tasks = {pool.submit(self._ask_and_keep, prompt, paths): prompt for prompt in pending}
        try:
            progress = tqdm(as_completed(tasks), desc=one_line(self.section.judge), total=len(tasks))
            answers = {tasks[task]: task.result() for task in progress}
        except openai.OpenAIError as error:
            raise StageError(
                f"the judge {self.section.judge} at {self.base_url} failed: {self._quote(error)}: its answers so far are kept; "
                f"{self._find_remedy(error)}, then re-run to resume"
            ) from None  # the cause's traceback could show the key
        finally:
            pool.shutdown(cancel_futures=True)
        return {prompt: choice for prompt, choice in answers.items() if choice is not None}

    def _ask_and_keep(self, prompt: str, paths: dict[str, Path]) -> Choice | None:
        """Return the answer to a prompt, None if no more are to be asked. Raises openai.APIError if the endpoint has failed."""
        if self._stopped.is_set():
            return None
        try:
            choice = self.ask(prompt)
            if "error" in choice and self._answered is None and not self._answers_others(prompt, paths):
                raise openai.OpenAIError(f"its answers are {choice['error']}{self._text}")
        except openai.APIError as error:
            if not self._concerns_pair(error, prompt, paths):
                self._stopped.set()
                raise
            choice = self._refuse(error)
        except openai.OpenAIError:
            self._stopped.set()
            raise
        if is_usable(choice):
            durable.write(paths[prompt], json.dumps(choice, ensure_ascii=False))
        else:
            with self._lock:
                self._failed += 1
                if self._failed > MOST_FAILED * len(paths):
                    self._stopped.set()
        return choice

    def _concerns_pair(self, error: openai.APIError, prompt: str, paths: dict[str, Path]) -> bool:
        """Return whether an error is the fault of a pair rather than of the endpoint, the key or the model."""
        status = error.status_code if isinstance(error, openai.APIStatusError) else None
        is_certain = self._answered is None and status in CONCERN_ALL
        return not is_certain and self._answers_others(prompt, paths)

    def _find_remedy(self, error: openai.OpenAIError) -> str:
        """Say what helps against an error that ends the stage."""
        if isinstance(error, openai.APIConnectionError):
            return "start its server, correct evaluate_alpaca.base_url, or check the network"
        if not isinstance(error, openai.APIStatusError):
            return ADDRESS
        where = error.response.headers.get("location")
        moved = f", not to one that redirects to {quote(self.redact(where))}" if where else ""
        return REMEDIES.get(error.status_code, "wait until its server works again") + moved

    def _answers_others(self, prompt: str, paths: dict[str, Path]) -> bool:
        """Return whether the endpoint answers another prompt at once: if so, the failed one is at fault."""
        others = [self._answered] if self._answered else [other for other in paths if other != prompt][:OTHERS]
        return any(map(self._responds, others))

    def _responds(self, prompt: str) -> bool:
        """Return whether the endpoint answers or refuses a prompt, without retries."""
        try:
            choice = self._send(self._client.with_options(max_retries=0), prompt, self._form or FORMS[0])
        except openai.APIError as error:
            return isinstance(error, openai.APIStatusError) and error.status_code in FORM_REFUSED
        return "error" not in choice

    def _announce(self, pending: list[str], total: int) -> None:
        """Log how many requests will be sent and their estimated cost."""
        tokens = sum(map(len, pending)) / CHARACTERS_PER_TOKEN
        cost = "cost unknown (evaluate_alpaca.price_per_million_tokens is not set)"
        if self.section.price_per_million_tokens is not None:
            cost = f"{tokens * self.section.price_per_million_tokens / 1e6:.2f} dollars"
        requests = f"sending {len(pending)} requests ({total - len(pending)} answers kept)"
        log.info("%s: %s, about %.0f tokens, %s", self.section.judge, requests, tokens, cost)

    def _report_failed(self, failed: list[Choice], total: int) -> None:
        """Log how many pairs have no preference. Raises StageError if they are more than MOST_FAILED."""
        if not failed:
            return
        reason, remedy = self._explain_failed(failed)
        message = f"{self.section.judge}: {len(failed)} of {total} pairs have no preference: {reason}"
        if len(failed) > MOST_FAILED * total:
            raise StageError(
                f"{message}: more than {MOST_FAILED:.0%} make a win rate meaningless: choose another evaluate_alpaca.judge, or "
                f"{remedy}; its answers so far are kept"
            )
        limit = 100 * MOST_FAILED
        log.warning("%s; they are left out of the win rate and counted in the report (limit: %.0f%%)", message, limit)

    def _explain_failed(self, failed: list[Choice]) -> tuple[str, str]:
        """Return why pairs have no preference, and what to change about the judge's server."""
        if refused := sum("refused" in choice for choice in failed):
            return f"{refused} requests refused, the last because: {self._reason}", "change its server to take such requests"
        errors = [choice["error"] for choice in failed if "error" in choice]
        if errors:
            return f"{len(errors)} answers are {errors[0]}{self._text}", ADDRESS
        return (
            f"the likeliest tokens have neither m nor M, as in {json.dumps(failed[0])[:300]}",
            "serve it with log-probabilities",
        )


def connect(**options: Any) -> openai.OpenAI:
    """Return an OpenAI client that follows no redirects: the answers must be those of the address in dvc.lock.

    Raises StageError, without showing an address of CONNECTION, which may hold a password.
    """
    try:
        return openai.OpenAI(**options, http_client=openai.DefaultHttpxClient(follow_redirects=False))
    except Exception as error:  # each version of its HTTP client has its own
        names = [name for name in sorted(os.environ) if name.upper() in CONNECTION]
        raise StageError(
            f"no connection to {options['base_url']} can be set up ({type(error).__name__}): correct or unset the environment "
            f"variables {', '.join(names)}: proxies are http://HOST:PORT, certificates files that exist"
        ) from None


def check_url(url: str) -> str:
    """Return an endpoint's address. Raises StageError, without showing it, if it may hold a key, which would be published."""
    try:
        parts = httpx.URL(url)
        valid = parts.scheme in ("http", "https") and bool(parts.host) and (parts.port or 0) < 2**16
        valid = valid and not re.search("[?#@]", url)
    except httpx.InvalidURL:
        valid = False
    if not valid:
        raise StageError(
            "evaluate_alpaca.base_url must be http(s)://HOST/PATH, without a user, a query or a fragment, since it appears in "
            "reports and dvc.lock: put a key into the environment variable OPENAI_API_KEY"
        )
    return url


def read_key(judge: str) -> str:
    """Return OPENAI_API_KEY. Raises StageError, without showing it, if it is not set, or if one of SENT cannot be sent."""
    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        raise StageError(
            f"evaluate_alpaca.judge: {judge} is called over the network: set OPENAI_API_KEY (to any value for a "
            "server that you started without a key, such as vLLM)"
        )
    for name in SENT:
        value = os.environ.get(name, "")
        if not value.isascii() or not value.isprintable() or value != value.strip():
            raise StageError(
                f"{name} has spaces around it, a line break or another character that cannot be sent: set it again, without it"
            )
    return key


def to_messages(prompt: str, *, system: bool = True) -> list[Any]:
    """Convert AlpacaEval's ChatML prompt to chat messages; ChatML tokens in an output remain text.

    system: make two messages, system and user; otherwise, one of the user that starts with the system's text.
    """
    text = prompt.strip().removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>")
    first, second = (part.strip() for part in text.split("<|im_end|>\n<|im_start|>user\n", 1))
    if system:
        return [{"role": "system", "content": first}, {"role": "user", "content": second}]
    return [{"role": "user", "content": f"{first}\n\n{second}"}]


def check_kept(value: Any) -> Choice:
    """Return an answer that was kept. Raises ValueError if it has no preference, TypeError if it is not a JSON object."""
    if not isinstance(value, dict):
        raise TypeError(f"expected a JSON object, not {type(value).__name__}")
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # ValueError for what JSON or UTF-8 lacks
    if not is_usable(value):
        raise ValueError("expected a choice of a chat completion with log-probabilities of m or M")
    tokens = value.get("total_tokens")
    if tokens is not None and not is_count(tokens):
        raise ValueError("expected a number of tokens or null as total_tokens")
    return value


def is_count(value: Any) -> bool:
    """Return whether a server's number of tokens is one."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS


def is_usable(choice: Choice) -> bool:
    """Return whether a choice has a preference."""
    return not math.isnan(parse_choice(choice)[0])


def failed(choices: dict[str, Choice]) -> list[str]:
    """List the prompts whose choice has no preference."""
    return [prompt for prompt, choice in choices.items() if not is_usable(choice)]


def parse_choice(choice: Choice) -> list[float]:
    """Compute alpaca-eval's preference, from 1 (first output) to 2 (second), from the probabilities of m and M as first token.

    The preference is NaN if neither m nor M is among the likeliest tokens, or if their probabilities are not numbers.
    """
    from alpaca_eval.completion_parsers import logprob_parser

    try:
        entries = choice["logprobs"]["content"][0]["top_logprobs"]
        values = [entry["logprob"] for entry in entries if entry["token"] in ("m", "M")]
        if not values or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            return [math.nan]
        return [float(logprob_parser(choice, "m", ["m", "M"], is_binarize=False, log_prob_index=0)[0])]
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError):
        return [math.nan]
