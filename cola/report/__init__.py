"""Numbers shown: tables, figures, pages, trackers. Computes no statistics, and never imports torch."""
