"""What the documents say is run: every block of every page."""
