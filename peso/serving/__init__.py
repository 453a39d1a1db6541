"""The HTTP server: recommendations and collection of events (docs/how-to/serve.md)."""
