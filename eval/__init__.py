"""Evaluation: perplexity, divergence from a baseline, zero-shot tasks, speed."""
