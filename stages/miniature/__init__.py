"""The miniature: a toy world with a base policy, a ranker and evaluation data of its own, made from the seed."""
