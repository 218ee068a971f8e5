"""The doors: the commands, what they print and how they end."""
