"""What answers: conversation, engine, cache, scheduler."""
