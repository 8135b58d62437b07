"""What a trained network has learned, and how it compares: measures and rivals."""
