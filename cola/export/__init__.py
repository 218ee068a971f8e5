"""Models out: an adapter, a merged model or the knots, and any model scored by the same evaluator."""
