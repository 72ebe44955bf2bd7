"""Bit allocation: which format each tensor gets, under a budget in stored bytes."""
