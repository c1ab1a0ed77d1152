"""The estimates of `python -m stages.tools plan`: sizes, work, hours and memory of each stage, and the rates behind them."""
