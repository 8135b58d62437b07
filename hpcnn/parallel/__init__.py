"""Where the towers meet: a model and a plan become a program of local layers, and gradients travel."""
