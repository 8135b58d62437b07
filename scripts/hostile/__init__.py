"""Hostile inputs for `scripts/fuzz.py` and tests: valid files, and what is done to them."""
