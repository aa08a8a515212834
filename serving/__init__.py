"""FastAPI application over an engine, with the OpenAI wire format."""
