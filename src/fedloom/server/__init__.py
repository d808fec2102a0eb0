"""What a server does with uploads."""
