"""What a run's own messages and models reveal, measured by attacks on them."""
