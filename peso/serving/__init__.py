"""The HTTP server: recommendations from a workspace, events into it (docs/how-to/serve.md)."""
