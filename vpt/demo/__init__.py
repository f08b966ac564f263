"""What the demo shows of a trace, and which questions it suggests; its widgets are in app.py."""
