"""The engines: logits or hidden states in, log-probabilities and gradients out."""
