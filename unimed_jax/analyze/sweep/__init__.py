"""Sweeps: variants of one config over several seeds, trained in turn and compared in one table."""
