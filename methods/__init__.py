"""The methods that attnbench compares, one a file; a name with a leading underscore is a helper."""

if __name__ != "attnbench.methods":
    raise ImportError("import attnbench.methods, not methods: run `pip install -e .` in the checkout")
