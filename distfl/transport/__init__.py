"""How ranks talk: one small interface, one backend per file."""
