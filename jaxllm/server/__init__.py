"""An OpenAI-compatible HTTP server on top of `AsyncEngine`."""
