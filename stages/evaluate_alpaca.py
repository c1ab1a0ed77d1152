"""AlpacaEval 2.0 by alpaca-eval itself: a judge compares a model's answers with the reference outputs.

In the miniature the judge is the gold rule, called in process; otherwise one of alpaca-eval's own annotators.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from stages import cli, domain, files, params
from stages.cli import StageError

JUDGES = Path(__file__).parent / "judges"
SEPARATOR = "\x1e<|field of the gold judge|>\x1e"
"""Between the three fields of judges/gold/prompt.txt: long, for a policy may sample any single character."""

VARYING = ("date", "version", "time_per_example")
"""Ends of the names of annotation columns that change from run to run."""

NOT_CANONICAL = "the set is not the canonical 805 instructions, for which alone length control is defined"


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


def provide_length_control(folder: Path, home: Path) -> None:
    """Lay the files of the length-controlled win rate out as the Hub cache in which alpaca-eval looks for them."""
    revision = "0" * 40
    repository = home / "datasets--tatsu-lab--alpaca_eval"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    for file in folder.glob("*.csv"):
        shutil.copyfile(file, snapshot / file.name)
    os.environ["HF_HUB_CACHE"] = str(home)


def evaluate(
    outputs: list[dict[str, Any]], references: list[dict[str, Any]], judge: str, length_controlled: bool, cache: Path | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics (rates and errors in percent, length in characters) and annotations, by alpaca-eval.

    cache: where annotations are kept as they come, so that none is paid for twice; None keeps none.
    """
    from alpaca_eval import evaluate as alpaca_evaluate

    judge_arguments: dict[str, Any] = {"annotators_config": judge}
    if judge == "gold":
        judge_arguments = {
            "annotators_config": str(JUDGES / "gold"),
            "fn_completions": gold_judge,
            "fn_completion_parser": parse_gold,
        }
    elif "OPENAI_API_KEY" not in os.environ and "OPENAI_CLIENT_CONFIG_PATH" not in os.environ:
        raise StageError(f"the judge {judge} is asked over the network: set OPENAI_API_KEY")
    if cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
    table, annotations = alpaca_evaluate(
        model_outputs=outputs,
        reference_outputs=references,
        precomputed_leaderboard=None,
        fn_metric="get_length_controlled_winrate" if length_controlled else "get_winrate",
        metric_kwargs={"save_weights_dir": None} if length_controlled else None,
        sort_by="win_rate",
        output_path=None,
        is_return_instead_of_print=True,
        caching_path=cache and str(cache),
        annotation_kwargs={"chunksize": 16},
        **judge_arguments,
    )
    metrics = {
        name: value.item() if hasattr(value, "item") else value for name, value in table.iloc[0].items() if name != "mode"
    }
    failed = [row["instruction"] for row in annotations if row["preference"] is None or row["preference"] != row["preference"]]
    metrics["n_failed"] = len(failed)
    kept = [
        {name: None if value != value else value for name, value in row.items() if not name.endswith(VARYING)}
        for row in annotations
    ]
    return metrics, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("answers", type=Path, help="model_outputs.json")
    parser.add_argument("alpaca_eval", type=Path, help="folder of the evaluation set, from assets")
    parser.add_argument("out", type=Path, help="folder for annotations.json and metrics.json")
    args = parser.parse_args()
    judge = params.load("evaluate_alpaca").evaluate_alpaca.judge
    keys = ["dataset", "instruction", "output", "generator"]
    outputs = files.read_records(args.answers, keys)
    references = files.read_records(args.alpaca_eval / "reference_outputs.json", keys)
    if [row["instruction"] for row in outputs] != [row["instruction"] for row in references]:
        raise StageError(f"{args.answers}: not the instructions of {args.alpaca_eval} in their order: answer them again")
    length_controlled = (args.alpaca_eval / "df_gamed.csv").exists()
    with tempfile.TemporaryDirectory() as home:
        if length_controlled:
            provide_length_control(args.alpaca_eval, Path(home))
        cache = None if judge == "gold" else cli.SCRATCH / "evaluate_alpaca" / f"{judge}.json"
        metrics, annotations = evaluate(outputs, references, judge, length_controlled, cache)
    metrics["judge"] = judge
    if not length_controlled:
        metrics["length_controlled_absent"] = NOT_CANONICAL
    with files.replacing(args.out) as partial:
        files.write_json(annotations, partial / "annotations.json")
        files.write_json(metrics, partial / "metrics.json")
    cli.log.info("win rate %.2f, standard error %.2f, by %s", metrics["win_rate"], metrics["standard_error"], judge)


if __name__ == "__main__":
    cli.run(main)
