"""Nothing is trained twice: names of states, the store that shares them, and the folder of a run."""
