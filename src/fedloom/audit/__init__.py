"""What our own wire reveals: attacks on a simulated run, with what the server of that run received and no more."""
