"""Many comparisons as one study: sweeps that survive a kill, their results and plots, and the history of all runs."""
