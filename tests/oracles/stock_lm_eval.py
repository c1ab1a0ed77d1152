"""Evaluate a model with lm-eval 0.4.1 alone: python stock_lm_eval.py MODEL DATA_SETS BATCH_SIZE OUT TASK:SHOTS ...

Runs in the harness environment. Writes the results and the score of every question; a bf16 model's log-likelihood from the
stage's adapter, beside the values with log-softmax in float32 and in bf16; and the results of the data sets' exact_match metric
on a few cases.
"""

import json
import os
import sys
from pathlib import Path

model, data_sets, batch_size, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]).resolve()
os.chdir(data_sets)

import lm_eval  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from lm_eval.api.metrics import exact_match  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import initialize_tasks  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from stages.engines import harness_worker  # noqa: E402

initialize_tasks()
torch.set_num_threads(1)
lm = get_model("hf").create_from_arg_string(f"pretrained={model},dtype=float32", {"batch_size": batch_size, "device": "cpu"})
results, samples = {}, {}
for argument in sys.argv[5:]:
    task, shots = argument.split(":")
    evaluation = lm_eval.simple_evaluate(model=lm, tasks=[task], num_fewshot=int(shots))
    results |= evaluation["results"]
    samples[task] = [
        {key: sample[key] for key in ("doc_id", "acc", "acc_norm", "exact_match") if key in sample}
        for sample in evaluation["samples"][task]
    ]

context, continuation = list(range(2, 40)), list(range(40, 60))
adapter = harness_worker.load_policy(str(model), "bfloat16", 4)
[[(log_likelihood, _)]] = adapter.score([(context, [continuation])])
plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
with torch.no_grad():
    logits = plain(torch.tensor([context + continuation[:-1]])).logits[0, -len(continuation) :]


def compare_choices() -> dict[str, float]:
    """Compare log-likelihoods of the four choices, and of longer answers, with those that the harness computes one by one."""
    float32 = harness_worker.load_policy(str(model), "float32", 4)
    choices, answers = [[7], [9], [11], [13]], [[7, 8], [9]]
    requests = [(("", ""), context, choice) for choice in choices + answers]
    stock = [lm._loglikelihood_tokens([request], disable_tqdm=True)[0] for request in requests]
    [shared] = float32.score([(context, choices)])
    [[first], [second]] = float32.score([(context, [answer]) for answer in answers])
    ours = [*shared, first, second]
    best = int(lm._model_call(torch.tensor([context]))[0, -1].argmax())
    [[(_, greedy), (_, other)]] = float32.score([(context, [[best], [best - 1]])])
    return {
        "difference": max(abs(left - right) for (left, _), (right, _) in zip(ours, stock, strict=True)),
        "size": min(abs(value) for value, _ in stock),
        "greedy": greedy and not other and [flag for _, flag in ours] == [flag for _, flag in stock],
    }


def sum_logps(logps: torch.Tensor) -> float:
    return float(logps[torch.arange(len(continuation)), torch.tensor(continuation)].sum())


def match(prediction: str, reference: str, **options: object) -> float:
    return exact_match.compute(predictions=[prediction], references=[reference], **options)["exact_match"]


out.write_text(
    json.dumps(
        {
            "results": results,
            "samples": samples,
            "bf16": {
                "stage": log_likelihood,
                "float32 log-softmax": sum_logps(logits.float().log_softmax(-1)),
                "bf16 log-softmax": sum_logps(logits.log_softmax(-1)),
            },
            "choices": compare_choices(),
            "exact_match": {
                "equal": match("a", "a"),
                "different": match("a", "b"),
                "case counts": match("A", "a"),
                "case ignored": match("A", "a", ignore_case=True),
                "punctuation ignored": match("a, b!", "a b", ignore_punctuation=True),
                "digits ignored": match("a1", "a2", ignore_numbers=True),
                "gsm8k": match("1,024", "b is\n#### 1024", regexes_to_ignore=[",", "\\$", "(?s).*#### "], ignore_case=True),
                "half": exact_match.compute(predictions=["a", "b"], references=["a", "c"])["exact_match"],
            },
        },
        default=float,
    )
)
