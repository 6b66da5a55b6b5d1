"""The self-contained demo: a small data set and a tiny base model, both made from a seed."""
