"""Proximal terms in other libraries' trainers. Each module needs its library only when it is imported."""
