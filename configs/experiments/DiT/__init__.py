"""Experiments with transformers on ImageNet-256 in latents of 4 x 32 x 32."""
