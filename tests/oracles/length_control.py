"""Print a length-controlled win rate and its error, bit for bit, of annotations made up from a seed; portable numerics.

With the argument `emulated`, NumPy does without AVX2: QEMU 7.2 crashes in its sort.
"""

import os
import random
import sys
import tempfile
from pathlib import Path

from stages.engines import numerics

COUNT = 300
LENGTH, DIFFICULTY = 120, 2.0

used = numerics.apply("portable")
if sys.argv[1:] == ["emulated"]:
    os.environ["NPY_DISABLE_CPU_FEATURES"] += " X86_V3 AVX2 FMA3"
import pandas as pd  # noqa: E402  after the numerics

from stages.judges import scoring  # noqa: E402

rng = random.Random("length control")
outputs, annotations = [], []
gamed: dict[str, list[dict[str, object]]] = {"concise": [], "verbose": []}
for index in range(COUNT):
    difficulty = rng.gauss(0, DIFFICULTY)
    texts = ["x" * rng.randrange(1, LENGTH) for _ in range(2)]
    row = {"instruction": f"instruction {index}", "output": texts[1], "generator": "ours", "dataset": "made up"}
    outputs.append(row)
    preference = 1 + rng.random()
    pair = {"output_1": texts[0], "output_2": texts[1], "generator_1": "reference", "generator_2": "ours"}
    annotations.append({"instruction": row["instruction"], "index": index, "annotator": "a", "preference": preference, **pair})
    for model, rows in gamed.items():
        rows.append(
            {
                "model": model,
                "preference": rng.random(),
                "index": index,
                "std_delta_len": rng.gauss(0, 1),
                "instruction_difficulty": difficulty,
                "not_gamed_baseline": False,
            }
        )
with tempfile.TemporaryDirectory() as folder:
    pd.DataFrame([*gamed["concise"], *gamed["verbose"]]).to_csv(Path(folder) / "df_gamed.csv", index=False)
    metrics = scoring.score_annotations(annotations, outputs, Path(folder))
numerics.verify(used)
print(*[float(metrics[name]).hex() for name in ("length_controlled_winrate", "lc_standard_error", "win_rate")])
