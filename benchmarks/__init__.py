"""Speed of the stages as ratios to what people use today: `make bench` writes benchmarks/results.md."""
