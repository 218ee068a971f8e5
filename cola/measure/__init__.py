"""Scores of examples, what training costs, and spectra of what was learned."""
