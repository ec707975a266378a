"""Losses: sequences' log-probabilities in, a loss and its gradient out."""
