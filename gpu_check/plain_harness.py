"""lm-eval alone, one request at a time: python -m gpu_check.plain_harness MODEL DATA_SETS OUT TASK:SHOTS:METRIC ...

This is the oracle of evaluate-lm, so it shares no code with the stages. Writes (sub)task -> the score of each question.
"""

import json
import os
import sys
from pathlib import Path


def main(model: Path, data_sets: Path, out: Path, tasks: list[str]) -> None:
    for name in ("HF_DATASETS_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE", "HF_MODULES_CACHE"):
        os.environ[name] = str(out.parent / "cache" / name)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    os.chdir(data_sets)  # where the harness looks for its data sets, by their names on the Hub

    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import initialize_tasks

    initialize_tasks()
    lm = HFLM(pretrained=str(model), dtype="float32", batch_size=1, device="cuda" if torch.cuda.is_available() else "cpu")
    scores = {}
    for task in tasks:
        name, shots, metric = task.split(":")
        samples = lm_eval.simple_evaluate(model=lm, tasks=[name], num_fewshot=int(shots))["samples"]
        for subtask, rows in samples.items():
            scores[subtask] = [float(row[metric]) for row in sorted(rows, key=lambda row: row["doc_id"])]
    out.write_text(json.dumps(scores), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), Path(sys.argv[3]).resolve(), sys.argv[4:])
