"""What is asked: sections, arms, checks, YAML, faults, and the plan of links, steps and rates. No torch."""
