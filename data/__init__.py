"""A package, so that no other package of the name `data` can come before it."""
