"""Draw K responses per prompt from the policy pi_t (Alg. 1, line 3)."""

import argparse
from pathlib import Path

from stages import cli, files, params, sampling, schemas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("iteration", help="name of the iteration, part of every sample's seed")
    parser.add_argument("model", type=Path, help="the policy pi_t")
    parser.add_argument("prompts", type=Path, help="the iteration's part, from split")
    parser.add_argument("out", type=Path, help="Parquet of responses")
    args = parser.parse_args()
    wanted = params.load("seed", "engine", "generate")
    generate = wanted.generate
    draw = sampling.Sampling(
        samples=generate.samples,
        temperature=generate.temperature,
        top_p=generate.top_p,
        max_new_tokens=generate.max_new_tokens,
        seed=wanted.seed,
        name=args.iteration,
    )
    part = files.read_table(args.prompts, schemas.PART)
    responses = sampling.respond("generate", part, args.model, wanted.engine, draw, generate.shard_size, leave_out=True)
    files.write_table(responses, schemas.RESPONSES, args.out)


if __name__ == "__main__":
    cli.run(main)
