"""Sample K responses per prompt from the policy pi_t (Alg. 1, line 3)."""

import argparse
from pathlib import Path

from stages.artifacts import models, schemas, tables
from stages.engines import sampling
from stages.runtime import params


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--iteration", required=True, help="name of the iteration, part of every sample's seed")
    parser.add_argument("--model", type=Path, required=True, help="folder of the policy pi_t")
    parser.add_argument("--prompts", type=Path, required=True, help="Parquet of the iteration's prompts, from split")
    parser.add_argument("--out", type=Path, required=True, help="Parquet of the responses")


def main(args: argparse.Namespace) -> None:
    settings = params.load("seed", "engine", "generate")
    generate = settings.generate
    draw = sampling.Sampling(
        samples=generate.samples,
        temperature=generate.temperature,
        top_p=generate.top_p,
        max_new_tokens=generate.max_new_tokens,
        seed=settings.seed,
        name=args.iteration,
    )
    prompts = tables.read(args.prompts, schemas.SPLIT)
    models.rehearse_saving(args.model)  # train will save it: known before anything is sampled
    responses = sampling.sample_responses(
        "generate", prompts, args.model, settings.engine, draw, generate.shard_size, skip_too_long=True
    )
    tables.write(responses, schemas.RESPONSES, args.out)
