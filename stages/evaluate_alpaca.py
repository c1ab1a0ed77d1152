"""AlpacaEval 2.0 by alpaca-eval itself: a judge compares a model's answers with the reference outputs.

The judge is the miniature's gold rule, called in process, or a model at an OpenAI-compatible endpoint, asked by AlpacaEval
2.0's own prompt. `python -m stages.evaluate_alpaca score` scores annotations that exist already, by any judge.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

from tqdm import tqdm

from stages import cli, domain, files, params, scratch
from stages.cli import StageError

JUDGES = Path(__file__).parent / "judges"
SEPARATOR = "\x1e<|field of the gold judge|>\x1e"
"""Between the three fields of judges/gold/prompt.txt: long, for a policy may sample any single character."""

PROMPT = "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
"""Of alpaca-eval's evaluators_configs: asks which output is the better one, m or M."""

REQUEST: dict[str, Any] = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "logprobs": True, "top_logprobs": 5}
"""As alpaca-eval's weighted_alpaca_eval_gpt4_turbo asks: what counts are the probabilities of m and M as first token."""

OPENAI = "https://api.openai.com/v1"
RETRIES = 12
"""After a rate limit, a server's error or a lost connection, from half a second to eight apart: a minute in all."""
TIMEOUT = 300
"""Seconds that one request may take."""
CHARACTERS_PER_TOKEN = 4
"""Of English, roughly: the estimate of the cost needs no tokenizer."""

VARYING = ("date", "version", "time_per_example")
"""Ends of the names of annotation columns that change from run to run."""

CANONICAL = "c5770d532bf3f697768ed9a57a05d8b58b2617321ca65070620f059676e7c99a"
"""SHA-256 of AlpacaEval's 805 instructions in their order, as a JSON list."""
NOT_CANONICAL = "the set is not the canonical 805 instructions, for which alone length control is defined"

SCORES = [
    "length_controlled_winrate",
    "lc_standard_error",
    "win_rate",
    "standard_error",
    "n_wins",
    "n_draws",
    "n_total",
    "avg_length",
]


def canonical(instructions: list[str]) -> bool:
    """Whether these are AlpacaEval's 805 in their order: length control takes an instruction's difficulty by its position."""
    return hashlib.sha256(json.dumps(instructions).encode()).hexdigest() == CANONICAL


def gold_judge(prompts: list[str], **_: Any) -> dict[str, list[Any]]:
    """alpaca-eval's completion function: the gold probability that the first output is better, as JSON text."""
    completions = []
    for prompt in prompts:
        fields = prompt.split(SEPARATOR)
        if len(fields) != 3:
            raise StageError(
                f"an instruction or output holds the separator {SEPARATOR!r} of the judge's prompt: {prompt[:80]!r}"
            )
        completions.append(json.dumps(domain.preference(*fields)))
    return {"completions": completions, "price_per_example": [0.0] * len(prompts), "time_per_example": [0.0] * len(prompts)}


def parse_gold(completion: str) -> list[float]:
    """alpaca-eval's preference of a probability p that the first output is better: 1 the first, 2 the second."""
    return [2.0 - float(json.loads(completion))]


def model_judge(wanted: params.EvaluateAlpaca, retries: int = RETRIES) -> Callable[..., dict[str, list[Any]]]:
    """alpaca-eval's completion function that asks a model: for each prompt the choice it answers, as a dictionary.

    Answers are kept in the scratch folder as they come, a file each, and not asked for again. Those that parse_choice
    cannot read are not kept, and asked for once more.
    Raises StageError without OPENAI_API_KEY; the function raises it where the endpoint refuses or still fails after the
    retries, and where no answer can be read.
    """
    import openai

    secret = os.environ.get("OPENAI_API_KEY")
    if not secret:
        raise StageError(
            f"the judge {wanted.judge} is asked over the network: set OPENAI_API_KEY (any word will do for a server that you "
            "started without a key, such as vLLM)"
        )
    base_url = wanted.base_url or OPENAI
    client = openai.OpenAI(api_key=secret, base_url=base_url, max_retries=retries, timeout=TIMEOUT)
    logging.getLogger("openai").setLevel(logging.INFO)  # says that it tries again, which explains a pause
    key = hashlib.sha256(json.dumps([wanted.judge, base_url, REQUEST]).encode()).hexdigest()[:16]
    folder = scratch.FOLDER / "evaluate_alpaca" / key
    given_up = Event()

    def hidden(text: str) -> str:
        """What the endpoint said, which may have quoted the key. A word of a few letters is no secret."""
        return text if len(secret) < 8 else text.replace(json.dumps(secret)[1:-1], "...").replace(secret, "...")

    def ask(prompt: str, path: Path) -> dict[str, Any]:
        if given_up.is_set():
            return {}
        try:
            answer = client.chat.completions.create(model=wanted.judge, messages=messages(prompt), **REQUEST)
            choice: dict[str, Any] = json.loads(hidden(json.dumps(answer.choices[0].model_dump())))
            choice["total_tokens"] = answer.usage.total_tokens if answer.usage else None
        except (AttributeError, IndexError, TypeError, ValueError, openai.APIResponseValidationError) as error:
            return {"error": f"not a chat completion: {type(error).__name__}"}
        except openai.APIError as error:
            if error.code in ("content_filter", "invalid_prompt"):  # of this pair of outputs only: no reason to stop
                return {"error": error.code}
            given_up.set()
            raise
        if not math.isnan(parse_choice(choice)[0]):
            files.write_json(choice, path)
        return choice

    def completions(prompts: list[str], **_: Any) -> dict[str, list[Any]]:
        paths = {prompt: folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.json" for prompt in prompts}
        answers: dict[str, dict[str, Any]] = {}
        for first in (True, False):
            pending = [prompt for prompt, path in paths.items() if not path.exists()]
            if pending and first:
                announce(wanted, pending, len(paths))
            pool = ThreadPoolExecutor(wanted.workers)
            tasks = {pool.submit(ask, prompt, paths[prompt]): prompt for prompt in pending}
            try:
                for task in tqdm(as_completed(tasks), desc=wanted.judge, total=len(tasks), disable=not tasks):
                    answers[tasks[task]] = task.result()
            except openai.OpenAIError as error:
                reason = cli.folded(hidden(f"{error} {error.__cause__ or ''}")).rstrip(".")
                raise StageError(
                    f"the judge {wanted.judge} at {base_url} failed: {reason}: its answers so far are kept, run again to go on"
                ) from None  # whose traceback could quote the key
            finally:
                pool.shutdown(cancel_futures=True)
        failed = [prompt for prompt, path in paths.items() if not path.exists()]
        if failed:
            example = json.dumps(answers[failed[0]])[:300]
            message = (
                f"{len(failed)} of {len(paths)} answers of {wanted.judge} have neither m nor M as a likely token: {example}"
            )
            if len(failed) == len(paths):
                raise StageError(f"{message}: take another judge")
            cli.log.warning(message)
        choices = [answers[prompt] if prompt in failed else files.read_json(paths[prompt]) for prompt in prompts]
        price = math.nan if wanted.price_per_million_tokens is None else wanted.price_per_million_tokens / 1e6
        return {"completions": choices, "price_per_example": [(c.get("total_tokens") or math.nan) * price for c in choices]}

    return completions


def announce(wanted: params.EvaluateAlpaca, prompts: list[str], total: int) -> None:
    """Log what will be asked and its estimated cost, in dollars."""
    tokens = sum(map(len, prompts)) / CHARACTERS_PER_TOKEN
    cost = "the price is unknown (evaluate_alpaca.price_per_million_tokens)"
    if wanted.price_per_million_tokens is not None:
        cost = f"{tokens * wanted.price_per_million_tokens / 1e6:.2f} dollars"
    kept = total - len(prompts)
    cli.log.info("%s: asks %d times (%d kept), about %.0f tokens, %s", wanted.judge, len(prompts), kept, tokens, cost)


def messages(prompt: str) -> list[Any]:
    """The chat messages of AlpacaEval's prompt: one of the system, one of the user, whatever marks the outputs hold."""
    text = prompt.strip().removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>")
    system, user = text.split("<|im_end|>\n<|im_start|>user\n", 1)
    return [{"role": "system", "content": system.strip()}, {"role": "user", "content": user.strip()}]


def parse_choice(choice: dict[str, Any]) -> list[float]:
    """alpaca-eval's preference by the probabilities of m and M as first token; NaN where neither is among the likeliest."""
    from alpaca_eval.completion_parsers import logprob_parser

    try:
        tokens = {entry["token"] for entry in choice["logprobs"]["content"][0]["top_logprobs"]}
        if not tokens & {"m", "M"}:
            return [math.nan]
        return [float(logprob_parser(choice, "m", ["m", "M"], is_binarize=False, log_prob_index=0)[0])]
    except (IndexError, KeyError, TypeError):
        return [math.nan]


def provide_length_control(folder: Path, home: Path) -> None:
    """Have alpaca-eval find the file it fits the length-controlled win rate with: as in the Hub's cache. Raises StageError."""
    from alpaca_eval import constants

    file = folder / "df_gamed.csv"
    if not file.exists():
        raise StageError(f"{file} is missing, which length control needs: it is in the Hub's data set tatsu-lab/alpaca_eval")
    revision = "0" * 40
    repository = home / "datasets--tatsu-lab--alpaca_eval"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    shutil.copyfile(file, snapshot / file.name)
    constants.DEFAULT_CACHE_DIR = str(home)


def by_alpaca_eval(
    outputs: list[dict[str, Any]], references: list[dict[str, Any]], length_control: Path | None, **annotator: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """alpaca-eval's metrics (rates and errors in percent, length in characters) and annotations.

    length_control: folder of df_gamed.csv; None for win rates without. annotator: alpaca-eval's arguments that choose it.
    """
    from alpaca_eval import evaluate as alpaca_evaluate

    logging.getLogger().setLevel(logging.WARNING)  # alpaca-eval turns every library's small talk on
    with tempfile.TemporaryDirectory() as home:
        if length_control:
            provide_length_control(length_control, Path(home))
        table, annotations = alpaca_evaluate(
            model_outputs=outputs,
            reference_outputs=references,
            precomputed_leaderboard=None,
            fn_metric="get_length_controlled_winrate" if length_control else "get_winrate",
            metric_kwargs={"save_weights_dir": None} if length_control else None,
            sort_by="win_rate",
            output_path=None,
            is_return_instead_of_print=True,
            annotation_kwargs={"chunksize": None},
            **annotator,
        )
    values = {name: value.item() if hasattr(value, "item") else value for name, value in table.iloc[0].items()}
    return {name: None if value != value else value for name, value in values.items() if name != "mode"}, annotations


def evaluate(
    outputs: list[dict[str, Any]], references: list[dict[str, Any]], wanted: params.EvaluateAlpaca, length_control: Path | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics, those of `by_alpaca_eval` and n_failed, and annotations by the judge that is wanted. Raises StageError."""
    annotator: dict[str, Any]
    if wanted.judge == "gold":
        annotator = {
            "annotators_config": str(JUDGES / "gold"),
            "fn_completions": gold_judge,
            "fn_completion_parser": parse_gold,
        }
    else:
        from alpaca_eval.constants import EVALUATORS_CONFIG_DIR

        annotator = {
            "annotators_config": str(JUDGES / "weighted"),
            "prompt_template": str(EVALUATORS_CONFIG_DIR / PROMPT),
            "fn_completions": model_judge(wanted),
            "fn_completion_parser": parse_choice,
        }
    metrics, annotations = by_alpaca_eval(outputs, references, length_control, caching_path=None, **annotator)
    metrics["judge"] = wanted.judge
    metrics["n_failed"] = sum(row["preference"] is None or row["preference"] != row["preference"] for row in annotations)
    kept = [
        {name: None if value != value else value for name, value in row.items() if not name.endswith(VARYING)}
        for row in annotations
    ]
    return metrics, kept


def judge(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("answers", type=Path, help="model_outputs.json")
    parser.add_argument("alpaca_eval", type=Path, help="folder of the evaluation set, from assets")
    parser.add_argument("out", type=Path, help="folder for annotations.json and metrics.json")
    args = parser.parse_args(arguments)
    wanted = params.load("evaluate_alpaca").evaluate_alpaca
    keys = ["dataset", "instruction", "output", "generator"]
    outputs = files.read_records(args.answers, keys)
    references = files.read_records(args.alpaca_eval / "reference_outputs.json", keys)
    instructions = [row["instruction"] for row in references]
    if [row["instruction"] for row in outputs] != instructions:
        raise StageError(f"{args.answers}: not the instructions of {args.alpaca_eval} in their order: answer them again")
    length_control = args.alpaca_eval if canonical(instructions) else None
    metrics, annotations = evaluate(outputs, references, wanted, length_control)
    if not length_control:
        metrics["length_controlled_absent"] = NOT_CANONICAL
    with files.replacing(args.out) as partial:
        files.write_json(annotations, partial / "annotations.json")
        files.write_json(metrics, partial / "metrics.json")
    cli.log.info("win rate %.2f, standard error %.2f, by %s", metrics["win_rate"], metrics["standard_error"], wanted.judge)


def score(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="evaluate_alpaca.py score",
        description="Print AlpacaEval 2.0's figures of annotations that exist already, as JSON.",
    )
    parser.add_argument("--annotations", type=Path, required=True, help="alpaca-eval's annotations.json of one model")
    parser.add_argument("--outputs", type=Path, required=True, help="the model_outputs.json that was annotated")
    parser.add_argument(
        "--alpaca-eval", type=Path, default=Path("data/alpaca_eval_set"), help="folder of df_gamed.csv (%(default)s)"
    )
    parser.add_argument("--no-length-control", action="store_true", help="win rates without length control")
    args = parser.parse_args(arguments)
    annotations = files.read_records(args.annotations, ["instruction", "output_1", "output_2", "generator_1", "generator_2"])
    for index, row in enumerate(annotations):
        if not isinstance(row.get("preference"), int | float | None):
            raise StageError(f"{args.annotations}: record {index}: 'preference' is no number: give alpaca-eval's annotations")
    outputs = files.read_records(args.outputs, ["instruction", "output", "generator"])
    annotated = sorted((row["instruction"], row["output_2"], row["generator_2"]) for row in annotations)
    if annotated != sorted((row["instruction"], row["output"], row["generator"]) for row in outputs):
        raise StageError(f"{args.outputs}: not the outputs that {args.annotations} is about: give the very file")
    if len({row["generator"] for row in outputs}) > 1:
        raise StageError(f"{args.outputs}: outputs of several models ('generator'): score one at a time")
    if not args.no_length_control and not canonical([row["instruction"] for row in annotations]):
        raise StageError(
            f"{args.annotations}: not AlpacaEval's 805 instructions in their order, for which alone length control is defined: "
            "--no-length-control gives the other figures"
        )
    metrics, _ = by_alpaca_eval(
        outputs,
        outputs,  # instead of references, which nothing reads: the annotations are there
        None if args.no_length_control else args.alpaca_eval,
        Annotator=lambda **_: SimpleNamespace(annotate_head2head=lambda **_: annotations),
    )
    print(json.dumps({name: metrics[name] for name in SCORES if name in metrics}, indent=1))


def main() -> None:
    if sys.argv[1:2] == ["score"]:
        score(sys.argv[2:])
    else:
        judge(sys.argv[1:])


if __name__ == "__main__":
    cli.run(main)
