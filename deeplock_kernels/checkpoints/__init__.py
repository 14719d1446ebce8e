"""Model files: the containers that weights are kept in, and writing them so that a crash loses nothing."""
