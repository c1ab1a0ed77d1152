"""Speed of the stages as ratios to what people run today: `make bench` writes benchmarks/results.md."""
