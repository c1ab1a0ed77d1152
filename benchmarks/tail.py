"""Estimate how long generate takes with shards of several sizes: `python -m benchmarks.tail`.

A worker works on one shard at a time, and the last responses of each are sampled with most of the batch empty. Large shards
have fewer such ends, but a number of shards that is no multiple of the workers leaves GPUs idle. The hours are those of
`python -m stages.tools plan` for recipes/llama-3-8b on H100s: simulated, not measured on one.
"""

import math

from stages.runtime import params
from stages.runtime.paths import ROOT
from stages.tools.planning import hours, rates, sizes
from stages.tools.planning.methods import CURRENT
from stages.tools.planning.sizes import Size

RECIPE = ROOT / "recipes/llama-3-8b/params.yaml"
SHARDS = (256, 512, 625, 1000, 1024, 1250, 2500)
"""Prompts of a shard."""


def compare_shards(prompts: int, gpus: int) -> dict[int, tuple[float, float]]:
    """Return for each of SHARDS by which part generate takes longer than with one shard for each GPU, and the seconds of one
    shard."""
    settings = params.validate_unpinned(params.read(RECIPE), RECIPE)
    shape = sizes.find_shape(RECIPE.parent / "new", settings)  # a folder that does not exist: nothing is measured
    size = Size(prompts, sizes.PROMPT_TOKENS, sizes.RESPONSE_TOKENS, shape.parameters)
    machine = hours.Machine(rates.GPUS["H100"], gpus, CURRENT)

    def measure(shard: int) -> float:
        changed = settings.model_copy(update={"generate": settings.generate.model_copy(update={"shard_size": shard})})
        return hours.time_sampling("generate", changed, size, shape, machine)

    best = measure(prompts // gpus)
    seconds = {shard: measure(shard) for shard in SHARDS}
    return {shard: (total / best - 1, total / math.ceil(math.ceil(prompts / shard) / gpus)) for shard, total in seconds.items()}


def main() -> None:
    for prompts, gpus in ((20_000, 8), (20_000, 4)):
        print(f"{prompts} prompts on {gpus} GPUs, compared with one shard for each GPU:")
        for shard, (longer, seconds) in compare_shards(prompts, gpus).items():
            print(f"  {shard} prompts a shard: {longer:+.0%}, a shard takes {seconds:.0f} s")


if __name__ == "__main__":
    main()
