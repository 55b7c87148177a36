"""Room for layers that a method is plugged into to be trained."""
