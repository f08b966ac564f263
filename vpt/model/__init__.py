"""The model, and what makes, loads and trains it."""
