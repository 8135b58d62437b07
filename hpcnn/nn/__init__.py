"""Layers, losses and models: what is computed for a block of samples, never where the other samples are."""
