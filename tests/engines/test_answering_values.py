from pathlib import Path

import pyarrow as pa
import pytest

from stages.engines import answering, sampling
from stages.runtime import params
from stages.runtime.paths import ROOT


def test_answers_are_drawn_with_every_setting_of_params(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[sampling.Sampling] = []

    def sample(
        stage: str, prompts: pa.Table, model: Path, engine: object, draw: sampling.Sampling, *_: object, **__: object
    ) -> pa.Table:
        drawn.append(draw)
        return prompts

    monkeypatch.setattr(sampling, "sample_responses", sample)
    settings = params.load("engine", "answer", path=ROOT / "params.yaml")
    answer = settings.answer.model_copy(update={"temperature": 0.3, "top_p": 0.8, "max_new_tokens": 11})
    answering.draw_answers("answer", Path("m"), "iter1", ["a"], 7, settings.engine, answer)
    assert drawn == [sampling.Sampling(samples=1, temperature=0.3, top_p=0.8, max_new_tokens=11, seed=7, name="answer/iter1")]
