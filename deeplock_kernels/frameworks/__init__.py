"""The package as the backend of other frameworks; each module imports its own framework, and no other."""
