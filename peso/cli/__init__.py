"""The command line. Each command parses, calls one function elsewhere and prints what came back."""
