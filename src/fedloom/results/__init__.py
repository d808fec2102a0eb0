"""What one does with a run: export, chat, route, evaluate; and its forecast."""
