"""How pieces become bytes: one codec per file, found by name; ``base.py`` frames them."""
