"""What was measured, compared: estimates, intervals, tests, summaries. numpy and scipy, never torch."""
