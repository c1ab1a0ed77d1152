"""What runs the models: vLLM for sampling, PairRM for ranking, transformers and DeepSpeed for training."""
