"""Serving: how engines load what fewbits makes."""
