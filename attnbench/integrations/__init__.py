"""Drop-ins: methods inside the models of other libraries. Each module imports its library when it is used, never when it is imported."""
