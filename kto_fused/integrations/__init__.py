"""Trainers of other projects, run through this package's losses."""
