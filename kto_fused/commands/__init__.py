"""The command ``kto-fused``."""
