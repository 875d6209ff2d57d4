"""Callbacks: schedules and averages of the algorithm, and what a run leaves behind."""
