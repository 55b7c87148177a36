"""A package with a method of attnbench."""
