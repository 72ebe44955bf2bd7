"""Layers that are trained quantized."""
