"""Random directions in weight space, rebuilt anywhere from a seed and an index."""
