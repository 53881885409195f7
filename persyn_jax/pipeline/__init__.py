"""The stages, one file each, and their sequence. The only place where the rooms of floor 2 meet."""
