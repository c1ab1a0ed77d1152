"""The judges of AlpacaEval 2.0, the miniature's gold rule and models at an endpoint, and scoring by alpaca-eval."""
