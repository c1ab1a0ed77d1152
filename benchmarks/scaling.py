"""Simulate the recipe llama-3-8b on 1 to 64 nodes of 8 H100: where its hours go, and what limits each stage.

Nothing here has been measured at this size: it is a model on paper. `python -m benchmarks.scaling` prints the tables of
docs/scaling.md.
"""

import math
from dataclasses import dataclass

NODES = (1, 2, 4, 8, 16, 32, 64)
GPUS = 8
"""On each node."""
NODE_GB_S = 2.0
"""What one node reads from the shared file system, in GB/s; its processes share what it has read."""
SHARED_GB_S = 10.0
"""What the file system can serve to all nodes together: a mid-size parallel file system."""
DRIVER_SECONDS = 0.05
"""In the stage's own process, for each task: to deal it, receive its result and write a file, flushed to the disk."""
CLUSTER_SECONDS = 10.0
"""For each stage on a cluster: to join it and to start processes in the stage's environment."""
PRICE = 2.5
"""Dollars for an hour of one GPU."""
GLOBAL_BATCH, STEPS = 64, 312
"""Pairs of an optimizer's step, and steps of an iteration of 20,000 pairs."""
TRAFFIC_GB = 3 * 16.0
"""ZeRO-3: the bfloat16 weights of 8 billion parameters are gathered twice in a step, and their gradients summed once."""
LINKS = {"100 Gbit/s": 12.5, "8 x 400 Gbit/s": 400.0}
"""Network -> what one node sends, in GB/s."""


@dataclass(frozen=True)
class Stage:
    """A stage that deals tasks to all GPUs, or is one task of the group that trains."""

    name: str
    runs: int
    """In three iterations with four models."""
    gpu_seconds: float
    """Computing time of one run on one GPU, from what `plan` estimates for 8 H100, without starting and loading."""
    tasks: int
    """Into which a run is divided; more GPUs than that are idle."""
    start_seconds: float
    """Until a process computes: imports, the engine, compilation; without reading the model."""
    model_gb: float


STAGES = (
    Stage("generate", 3, 2_900, 16, 75, 16),
    Stage("rank", 3, 3_400, 79, 20, 1.7),
    Stage("answer", 4, 420, 6, 75, 16),
    Stage("evaluate-lm", 4, 3_100, 2_300, 25, 16),
)
"""Of 20,000 prompts, 1250 to a shard of generate and 256 to one of rank; of 1,305 instructions and held-out prompts; of 69,000
rows of requests, 32 to a chunk: MMLU's 14,000 questions are one row each, not four."""
PAIRS = {"reference": 1_050.0, "train": 5_200.0}
"""Stages that the processes compute together, 64 pairs at a time -> GPU-seconds of one of three runs."""
SERIAL_SECONDS = 3 * 230.0
"""Of three iterations, on one machine whatever the number of nodes: the judge's replies, hashing, DVC."""


def read_seconds(gigabytes: float, nodes: int) -> float:
    """Return how long every node takes to read the same model, when all begin at once."""
    return max(gigabytes / NODE_GB_S, gigabytes * nodes / SHARED_GB_S)


def simulate_tasks(stage: Stage, nodes: int) -> dict[str, float]:
    """Return the seconds of one run of a stage that deals tasks: what it computes, waits for and reads."""
    gpus = min(nodes * GPUS, stage.tasks)
    rounds = math.ceil(stage.tasks / gpus)
    return {
        "compute": stage.gpu_seconds / stage.tasks * rounds,
        "start": stage.start_seconds + (CLUSTER_SECONDS if nodes > 1 else 0),
        "read": read_seconds(stage.model_gb, min(nodes, math.ceil(stage.tasks / GPUS))),
        "driver": max(0.0, DRIVER_SECONDS * stage.tasks - stage.gpu_seconds / stage.tasks * rounds),
    }


def simulate_pairs(name: str, nodes: int, gigabytes_per_second: float) -> dict[str, float]:
    """Return the seconds of one run of reference or train on so many nodes, which have at most GLOBAL_BATCH GPUs together."""
    nodes = min(nodes, GLOBAL_BATCH // GPUS)
    passes = 1 if name == "train" else 1 / 3  # reference only gathers the weights once
    traffic = STEPS * TRAFFIC_GB * passes * (nodes - 1) / nodes / gigabytes_per_second
    compute = PAIRS[name] / (nodes * GPUS)
    return {
        "compute": compute,
        "start": 40.0 + (CLUSTER_SECONDS if nodes > 1 else 0),
        "read": read_seconds(16, nodes),
        "network": max(0.0, traffic - compute),  # what computing does not hide
        "write": 16 / NODE_GB_S if name == "train" else 0.0,
    }


def best_nodes(name: str, nodes: int, gigabytes_per_second: float) -> int:
    """Return the number of nodes, at most `nodes`, on which reference or train is fastest: the value for train.nodes."""
    return min(
        (count for count in NODES if count <= nodes),
        key=lambda count: sum(simulate_pairs(name, count, gigabytes_per_second).values()),
    )


def simulate(nodes: int, gigabytes_per_second: float) -> dict[str, dict[str, float]]:
    """Return stage -> what it spends its time on -> seconds, over all of its runs."""
    runs = {stage.name: (stage.runs, simulate_tasks(stage, nodes)) for stage in STAGES}
    for name in PAIRS:
        runs[name] = (3, simulate_pairs(name, best_nodes("train", nodes, gigabytes_per_second), gigabytes_per_second))
    seconds = {name: {part: count * value for part, value in parts.items()} for name, (count, parts) in runs.items()}
    return seconds | {"judge, hashing, DVC": {"serial": SERIAL_SECONDS}}


def format_hours() -> list[str]:
    """Format the table of minutes by stage and number of nodes, with the fast network."""
    results = {nodes: simulate(nodes, LINKS["8 x 400 Gbit/s"]) for nodes in NODES}
    lines = [f"| minutes, on nodes: | {' | '.join(map(str, NODES))} |", f"| --- |{' ---: |' * len(NODES)}"]
    for name in results[1]:
        lines.append(f"| {name} | {' | '.join(f'{sum(results[nodes][name].values()) / 60:.0f}' for nodes in NODES)} |")
    totals = {nodes: sum(sum(parts.values()) for parts in results[nodes].values()) for nodes in NODES}
    lines.append(f"| all | {' | '.join(f'{totals[nodes] / 60:.0f}' for nodes in NODES)} |")
    cost = {nodes: totals[nodes] / 3600 * nodes * GPUS * PRICE for nodes in NODES}
    return [*lines, f"| dollars | {' | '.join(f'{cost[nodes]:,.0f}' for nodes in NODES)} |"]


def format_train_nodes() -> list[str]:
    """Format the table of the minutes of one `train` by number of nodes and network."""
    columns = [nodes for nodes in NODES if nodes * GPUS <= GLOBAL_BATCH]
    lines = [f"| minutes of one train, on nodes: | {' | '.join(map(str, columns))} |", f"| --- |{' ---: |' * len(columns)}"]
    for name, speed in LINKS.items():
        cells = [sum(simulate_pairs("train", nodes, speed).values()) / 60 for nodes in columns]
        lines.append(f"| {name} between nodes | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    return lines


def format_limits() -> list[str]:
    """Format the table of what each stage spends its time on, in percent, on one node and on 64."""
    parts = ("compute", "start", "read", "driver", "network", "write")
    lines = [f"| percent of the stage's time | nodes | {' | '.join(parts)} |", f"| --- | ---: |{' ---: |' * len(parts)}"]
    for nodes in (NODES[0], NODES[-1]):
        for name, spent in simulate(nodes, LINKS["8 x 400 Gbit/s"]).items():
            if "serial" not in spent:
                shares = [100 * spent.get(part, 0) / sum(spent.values()) for part in parts]
                lines.append(f"| {name} | {nodes} | {' | '.join(f'{share:.0f}' for share in shares)} |")
    return lines


def main() -> None:
    print("\n\n".join("\n".join(table) for table in (format_hours(), format_train_nodes(), format_limits())))


if __name__ == "__main__":
    main()
