"""How adapters look in files: names, layouts, metadata, conversion. `kron_adapter` holds the layers themselves."""
