"""Array functions in forward and backward pairs. They know arrays and have never heard of ranks."""
