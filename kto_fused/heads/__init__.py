"""Loss heads: from sequences' log-probabilities to a loss and its gradient."""
