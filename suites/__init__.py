"""The questions that attnbench asks, one TOML file each."""
