"""Tensors that flow, parts, losses and pretrained weights: PyTorch and transformers, nothing else."""
