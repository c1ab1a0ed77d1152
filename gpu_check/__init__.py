"""Check the GPU code on one NVIDIA GPU: right numbers, repeatable bytes, speed and memory (docs/gpu-check.md)."""
