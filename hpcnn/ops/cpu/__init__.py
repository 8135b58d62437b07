"""The plain NumPy implementation of every operator; float32 and float64."""
