"""A recipe trained: each job found or trained, selected, scored and recorded."""
