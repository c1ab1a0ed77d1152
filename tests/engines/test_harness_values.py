from stages.engines import harness


def test_the_tasks_are_those_of_the_open_llm_leaderboard() -> None:
    """Shots and metrics as on huggingface.co/spaces/open-llm-leaderboard-old (version 1); gsm8k by its strict answer."""
    settings = {name: (task.shots, task.metric, task.filter) for name, task in harness.TASKS.items()}
    assert settings == {
        "arc_challenge": (25, "acc_norm", "none"),
        "hellaswag": (10, "acc_norm", "none"),
        "mmlu": (5, "acc", "none"),
        "truthfulqa_mc2": (0, "acc", "none"),
        "winogrande": (5, "acc", "none"),
        "gsm8k": (5, "exact_match", "get-answer"),
    }
