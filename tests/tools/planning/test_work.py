"""The work of the stages, counted by hand."""

import pytest

from stages.runtime import params
from stages.runtime.paths import ROOT
from stages.tools.planning import work
from stages.tools.planning.methods import ALL, PLAIN
from stages.tools.planning.sizes import Size
from support.recipes import change, read_recipe

SIZE = Size(prompts=10, prompt_tokens=100, response_tokens=200, parameters=1e9)
LLAMA = read_recipe("llama-3-8b")


def estimate(stage: str, settings: params.Params = LLAMA, size: Size = SIZE) -> work.Work:
    return work.estimate_work(stage, settings, size, PLAIN)


def test_the_work_of_an_iteration() -> None:
    assert estimate("generate").sampled == 10 * 5 * 200
    assert estimate("rank").passes == 10 * 20, "every ordered pair of five responses"
    assert estimate("rank").tokens == 10 * 20 * 500
    assert estimate("rank").rank == 10 * 20 * (500 * 0.75e9 + 51.5e9)
    assert estimate("compare").passes == 500 * 4 * 3
    assert estimate("answer").passes == 805 + 500
    assert estimate("answer-reference") == work.Work(), "the reference outputs are the set's own"
    assert estimate("evaluate-alpaca").dollars == pytest.approx(805 * 1250 * 10 / 1e6)
    assert estimate("split") == work.Work()


def test_a_pair_has_its_prompt_once_and_is_cut() -> None:
    short = change(LLAMA, "lengths", prompt=10**6, total=10**6)
    tokens = estimate("reference", short).tokens
    assert tokens == pytest.approx(10 * (100 + 2 * 200), rel=0.03)
    assert estimate("reference", short).forward == pytest.approx(2 * 1e9 * tokens)
    assert estimate("train", short).train == pytest.approx(8 * 1e9 * tokens), "forward twice, for gradient checkpointing"
    once = change(short, "train", gradient_checkpointing=False)
    assert estimate("train", once).train == pytest.approx(6 * 1e9 * tokens)
    adapters = change(short, "train", lora=params.Lora(rank=4, alpha=4))
    assert estimate("train", adapters).train == pytest.approx(6 * 1e9 * tokens), "no gradients of the weights"
    assert estimate("train", change(short, "train", stop_epoch=2)).tokens == pytest.approx(2 * tokens)
    long = Size(prompts=10, prompt_tokens=1e6, response_tokens=1e6, parameters=1e9)
    assert estimate("train", LLAMA, long).tokens == pytest.approx(10 * (512 + 2 * 512), rel=0.001), "cut to 512 and 1024"


def test_the_miniature_samples_its_own_reference_outputs_and_has_no_judge_to_pay() -> None:
    miniature = read_recipe(ROOT)
    assert estimate("answer-reference", miniature).sampled == 805 * 200
    for stage in ("evaluate-alpaca", "evaluate-lm"):
        assert estimate(stage, miniature) == work.Work()
    assert estimate("rank", miniature).rank == 0


def test_only_the_chosen_tasks_are_counted() -> None:
    every = estimate("evaluate-lm")
    assert (every.tokens, every.forward) == (82_500_000, 2e9 * 82_500_000)
    some = change(LLAMA, "evaluate_lm", tasks=["arc_challenge", "gsm8k"])
    assert estimate("evaluate-lm", some).tokens == 10_200_000
    assert set(work.HARNESS_TOKENS) == set(params.HarnessAsset.model_fields)
    shared = work.estimate_work("evaluate-lm", LLAMA, SIZE, ALL)
    assert shared.tokens == 82_500_000 - 37_000_000 * 3 / 4, "MMLU's four answers share a pass"


def test_a_checkpoint_takes_disk_space_by_its_own_precision() -> None:
    assert estimate("train", change(LLAMA, "train", checkpoint_dtype="bfloat16")).disk == 2e9
    assert estimate("train", change(LLAMA, "train", checkpoint_dtype="float32")).disk == 4e9


def test_a_recipe_that_trains_nothing() -> None:
    path = ROOT / "recipes/llama-3-8b-published/params.yaml"
    settings = params.validate_evaluation(params.read(path), path)
    assert work.estimate_work("answer", settings, SIZE, PLAIN).passes == 805, "there is no hold-out"
    assert work.estimate_work("train", settings, SIZE, PLAIN) == work.Work()
    judged = work.estimate_work("evaluate-alpaca", settings, SIZE, PLAIN)
    assert work.estimate_work("evaluate-alpaca-answers", settings, SIZE, PLAIN) == judged != work.Work()
    assert work.estimate_work("evaluate-lm", settings, SIZE, PLAIN) == estimate("evaluate-lm")
    more = settings.model_copy(update={"answers": {"gpt": "x.json"}})
    compared = work.estimate_work("compare-answers", more, SIZE, PLAIN)
    assert compared.passes == 805 * 5 * 4, "every ordered pair of five models"
    assert compared.rank > 0
