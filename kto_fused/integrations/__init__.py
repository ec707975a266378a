"""Other projects' trainers, run through this package."""
