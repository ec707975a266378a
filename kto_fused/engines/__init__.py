"""The engines: from logits or hidden states to log-probabilities, and back to gradients by them."""
