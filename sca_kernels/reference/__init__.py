"""The meaning of every operator in plain PyTorch: dense, slow, differentiable twice, on any device."""
