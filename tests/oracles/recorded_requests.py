"""Record the harness's requests: python recorded_requests.py DATA_SETS OUT (harness environment).

Evaluates every task as the stage does, but with an adapter that stores each request and answers it without a model: a
log-likelihood drawn by a hash of the prompt, and the right answer to every other question of gsm8k.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

data_sets, out = Path(sys.argv[1]), Path(sys.argv[2]).resolve()
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.chdir(data_sets)
for number, name in enumerate(("HF_DATASETS_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE", "HF_MODULES_CACHE")):
    os.environ[name] = str(out.parent / "cache" / str(number))

from lm_eval.api.model import LM  # noqa: E402

from stages.engines import harness  # noqa: E402

requests: list[list[Any]] = []
answers = [json.loads(line)["answer"] for line in Path("gsm8k/main/test.jsonl").read_text(encoding="utf-8").splitlines()]


class Recorder(LM):  # type: ignore[misc]
    cut: set[str] = set()  # noqa: RUF012 - no prompt is too long for it

    def loglikelihood(self, instances: list[Any]) -> list[tuple[float, bool]]:
        values = [-int(hashlib.sha256("".join(request.args).encode()).hexdigest()[:8], 16) / 2**28 for request in instances]
        requests.extend([*request.args, value] for request, value in zip(instances, values, strict=True))
        return [(value, False) for value in values]

    def generate_until(self, instances: list[Any]) -> list[str]:
        requests.extend([request.args[0]] for request in instances)
        return [answer if index % 2 == 0 else "I do not know." for index, answer in enumerate(answers)]

    def loglikelihood_rolling(self, instances: list[Any]) -> list[float]:
        raise NotImplementedError


recorded = {}
for task in harness.TASKS:
    requests.clear()
    results = harness.evaluate_task(task, Recorder())
    recorded[task] = {"items": results["items"], "requests": list(requests)}
out.write_text(json.dumps(recorded))
