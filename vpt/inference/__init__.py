"""Answering of requests: conversation, engine, cache, scheduler."""
