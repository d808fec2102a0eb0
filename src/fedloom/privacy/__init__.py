"""What a noisy sum tells of one client, and the noise itself."""
