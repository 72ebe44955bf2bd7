"""Recipes shipped with fewbits, one TOML file each."""
