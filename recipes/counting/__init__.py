"""Pictures of things to count."""
