"""What a recipe will take, before anything of it runs: parameters, memory, FLOPs, time, disk."""
