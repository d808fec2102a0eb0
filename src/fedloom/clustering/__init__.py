"""Who shares a model with whom, found by the clients' updates."""
