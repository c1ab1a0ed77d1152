"""Judges for AlpacaEval 2.0 (the miniature's gold rule, or a model at an endpoint), and scoring with alpaca-eval."""
