"""Modules for other frameworks, each of which imports its framework itself."""
