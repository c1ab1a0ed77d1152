"""What lm-eval 0.4.1 alone says: python stock_lm_eval.py MODEL DATA_SETS BATCH_SIZE OUT TASK:SHOTS .. (harness environment).

Also writes the log-likelihoods that the stage's model gives in bf16 beside those of a float32 log-softmax, and what the
data sets' exact_match says to a few cases.
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
from stages import evaluate_lm  # noqa: E402

initialize_tasks()
torch.set_num_threads(1)
lm = get_model("hf").create_from_arg_string(f"pretrained={model},dtype=float32", {"batch_size": batch_size, "device": "cpu"})
results = {}
for argument in sys.argv[5:]:
    task, shots = argument.split(":")
    found = lm_eval.simple_evaluate(model=lm, tasks=[task], num_fewshot=int(shots))
    results |= found["results"]

context, continuation = list(range(2, 40)), list(range(40, 60))
[(harness, _)] = evaluate_lm._policy(str(model), "bfloat16", 4)._loglikelihood_tokens([(("", ""), context, continuation)])
plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
with torch.no_grad():
    logits = plain(torch.tensor([context + continuation[:-1]])).logits[0, -len(continuation) :]


def chosen(logps: torch.Tensor) -> float:
    return float(logps[torch.arange(len(continuation)), torch.tensor(continuation)].sum())


def equal(prediction: str, reference: str, **options: object) -> float:
    return exact_match.compute(predictions=[prediction], references=[reference], **options)["exact_match"]


out.write_text(
    json.dumps(
        {
            "results": results,
            "bf16": {
                "stage": harness,
                "float32 log-softmax": chosen(logits.float().log_softmax(-1)),
                "bf16 log-softmax": chosen(logits.log_softmax(-1)),
            },
            "exact_match": {
                "equal": equal("a", "a"),
                "different": equal("a", "b"),
                "case counts": equal("A", "a"),
                "case ignored": equal("A", "a", ignore_case=True),
                "punctuation ignored": equal("a, b!", "a b", ignore_punctuation=True),
                "digits ignored": equal("a1", "a2", ignore_numbers=True),
                "gsm8k": equal("1,024", "b is\n#### 1024", regexes_to_ignore=[",", "\\$", "(?s).*#### "], ignore_case=True),
                "half": exact_match.compute(predictions=["a", "b"], references=["a", "c"])["exact_match"],
            },
        },
        default=float,
    )
)
