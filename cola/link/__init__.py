"""One link: the model, its pair, how it starts and is trained, and the knot that merges it."""
