"""Training recipes: learning rates, schedules and hooks."""
