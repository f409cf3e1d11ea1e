"""Measurements of whole commands: `make bench`. Tests never time anything."""
