"""The parts of virtual_cluster.py. The standard library only; nothing of the package."""
