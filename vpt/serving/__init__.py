"""The server: the runtime over HTTP, as clients of OpenAI's API expect it."""
